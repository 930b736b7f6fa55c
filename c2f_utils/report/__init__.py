"""What results on disk say: figures, tables, sentences, documents. Needs no torch."""
