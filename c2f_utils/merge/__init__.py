"""Knowledge residue merging: recipe -> plan -> stream -> commit -> verify.

The paper's formula is not public; base, instruct and coarse are explicit inputs and the default, instruct + c *
(coarse - base), is ours.

    recipe = load_recipe("recipe.yaml")
    plan = plan_merge(recipe)            # headers and configs only; plan.table()
    report = run_merge(plan, "out")      # memory independent of the model's size
    verify("out", recipe)                # random slices in float64
"""

from c2f_utils.merge.in_memory import Merger, StateDict, merge_state_dicts, random_residue
from c2f_utils.merge.kernels import Piece
from c2f_utils.merge.merge_report import Report, load_report
from c2f_utils.merge.operators import Operator, known_operators, register_operator
from c2f_utils.merge.plan import Plan, plan_merge
from c2f_utils.merge.recipe import Coefficient, Recipe, Rule, Weighted, load_recipe
from c2f_utils.merge.residues import anatomy
from c2f_utils.merge.stored import Lazy, open_stored
from c2f_utils.merge.stream import run_merge
from c2f_utils.merge.verification import Verified, verify, verify_and_record
