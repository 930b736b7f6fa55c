"""Every figure of the workbench, as a function of results on disk; the notebooks and the report draw from here.

Inputs: a stage, its directory, the run's directory, or data already read. Output: a matplotlib figure that carries the
numbers behind it (`fig.data`). A metric that is null is named in the figure, with the reason, never drawn as zero.
Rooms: `figures_training` (01 to 05), `figures_reward` (02: one pair, several reward models, over-optimisation),
`figures_laws` (09: the study of laws), `figures_merge` (06), `figures_forest` (07, 08: fine minus every other model),
`figures_models` (07, several seeds, the README's picture), `lineage` (which stage was made from which), `style` (one
look, saving), `results` (reading) and `labels` (names beside lines and points).
"""

from c2f_utils.report.figures_forest import forest, seed_forest
from c2f_utils.report.figures_laws import arms_map, limit_paths, regret_map
from c2f_utils.report.figures_merge import (
    coefficient_sweep,
    layer_sweep,
    operator_table,
    residue_anatomy,
    variant_differences,
)
from c2f_utils.report.figures_models import (
    hero,
    prefix_redundancy,
    quality_length_frontier,
    quality_redundancy_frontier,
    seed_overview,
)
from c2f_utils.report.figures_reward import length_bias_models, overoptimisation, pair_scores
from c2f_utils.report.figures_training import (
    credit_of_one_answer,
    length_bias,
    loss_curve,
    prefix_reward,
    reward_calibration,
    schedule_comparison,
    tokens_to_target,
    training_panel,
)
from c2f_utils.report.lineage import lineage
from c2f_utils.report.style import save_figure
