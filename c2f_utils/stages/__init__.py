"""What notebook NN does: one room per notebook, parents in, results out.

The other wings know nothing of stages. Every `make(run)` returns the stage's results, computed or loaded.
"""
