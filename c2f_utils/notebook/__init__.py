"""What a cell shows: the first and the last cell of every notebook, samples side by side, the training panel."""

from c2f_utils.notebook.cells import finish, say, seed_everything, start
from c2f_utils.notebook.panel import LivePanel
from c2f_utils.notebook.progress import Progress
from c2f_utils.notebook.show import links, sample_browser, side_by_side
from c2f_utils.notebook.vote import tally, vote
