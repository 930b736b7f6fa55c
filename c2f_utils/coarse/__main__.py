"""`accelerate launch -m c2f_utils.coarse run.yaml`: one training process; like `c2f` it may look at everything."""

import sys

from c2f_utils.stages.worker import main

sys.exit(main())
