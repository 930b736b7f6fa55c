"""Which embedded domain: the one place where `data.domain` becomes what makes problems, documents and instructions."""

from c2f_utils.domain.riddles import Riddles
from c2f_utils.domain.stories import Stories
from c2f_utils.settings.config import Data


def generator(data: Data) -> Stories | Riddles:
    """The embedded domain of these settings: its `problems`, `documents`, `instructions` and `vocabulary`."""
    return Riddles(data.operations) if data.domain == "riddles" else Stories(data.operations, data.world)
