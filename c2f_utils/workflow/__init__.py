"""What the notebooks call: one file per notebook, parents in, results out.

The rooms beside this folder know nothing of runs; here they are joined. Every `make(run)` returns the stage's
results: read from disk when the stage was done before, computed and saved otherwise.
"""
