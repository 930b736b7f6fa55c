"""Part of 07: how likely does each layer make the words of the user's list, at the place where an answer begins?"""

from torch import nn

from c2f_utils.domain import user_text
from c2f_utils.domain.forms import Form
from c2f_utils.files import sha256
from c2f_utils.measure import layer_lens, sampling
from c2f_utils.runs.run import Run
from c2f_utils.stages.inputs import Inputs
from c2f_utils.stages.pieces import Pieces


class Wordlist:
    """Probability of the words of `safety.wordlist` after the test prompts, by layer, for every model as it is
    prompted."""

    key = "wordlist"

    def __init__(self, run: Run, inputs: Inputs):
        source = run.settings.safety.wordlist
        run.here.add_input(f"data:{source}", sha256(source))
        self.inputs, self.settings, self.pieces = inputs, run.settings, Pieces(run.here)
        words = [word for part in user_text.read(source, "safety.wordlist") for word in part.split()]
        self.ids = layer_lens.word_ids(words, inputs.tokenizer)
        self.prompts = inputs.prompts("test")[: run.settings.safety.prompts]
        self.found: dict[str, list[dict]] = {}

    def add(self, name: str, model: nn.Module, form: Form) -> None:
        if name in ("instruct_forced", "base_forced"):
            return
        self.found[name] = self.pieces([self.key, name], lambda: self._measured(model, form))

    def _measured(self, model: nn.Module, form: Form) -> list[dict]:
        tokenizer, asked = self.inputs.asked(self.prompts, form)
        budget = self.settings.coarse.tokens_per_micro_batch
        likely = layer_lens.probability_by_layer(model, asked, self.ids, tokenizer.pad_token_id, budget)
        return [sampling.mean(row, self.settings.seed)._asdict() for row in likely]

    def results(self) -> dict:
        """`tokens` of the list, and of every model the mean probability after each layer with its interval."""
        return {"tokens": len(self.ids), "models": self.found}
