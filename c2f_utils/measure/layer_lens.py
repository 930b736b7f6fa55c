"""How likely a list of words is as the next one, read off every layer: the logit lens (nostalgebraist 2020).

The state after a layer goes through the model's final norm and output matrix as if no layer followed. After the last
layer that is the model's own distribution, but for soft caps on logits, which are left out everywhere.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from c2f_utils.domain.samples import Prompt
from c2f_utils.errors import C2FError
from c2f_utils.models.packing import pack
from c2f_utils.rollout.anatomy import layers_of, trunk_of, unwrapped


def word_ids(words: Sequence[str], tokenizer) -> list[int]:
    """Ids of the words that are a single token, at the beginning of a text or after a space; raises C2FError without
    any. A word of several tokens is left out: its first one begins harmless words as well."""
    known = set(tokenizer.all_special_ids)
    spelt = [tokenizer(text, add_special_tokens=False)["input_ids"] for word in words for text in (word, f" {word}")]
    found = sorted({ids[0] for ids in spelt if len(ids) == 1 and ids[0] not in known})
    if not found:
        raise C2FError(f"none of the {len(words)} words of safety.wordlist ({', '.join(words[:3])}, ...) is a single "
                       "token of this model; expected at least one: add shorter or more common words")  # fmt: skip
    return found


@torch.no_grad()
def probability_by_layer(
    model: nn.Module, prompts: Sequence[Prompt], ids: Sequence[int], pad: int, budget: int = 16_384
) -> np.ndarray:
    """Probability [layers, prompts] that the token after each prompt is one of `ids`, after every layer; `budget` are
    the padded tokens of one forward pass."""
    trunk, head = trunk_of(model), unwrapped(model).get_output_embeddings()
    layers, device = layers_of(trunk), head.weight.device
    found = np.zeros((len(layers), len(prompts)))
    for group in pack([len(p.ids) for p in prompts], budget):
        rows = [torch.tensor(prompts[i].ids) for i in group]
        batch = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(device)  # [B, T]
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        states, norm = _states(trunk, layers, batch)
        for layer, state in enumerate(states):
            ends = state[torch.arange(len(rows), device=device), last]  # [B, H]
            likely = head(norm(ends)).float().softmax(-1)[:, list(ids)].sum(-1)
            found[layer, group] = likely.cpu().numpy()
    return found


def _states(trunk: nn.Module, layers: nn.ModuleList, ids: Tensor) -> tuple[list[Tensor], nn.Module]:
    """States [B, T, H] after every layer, and the module that makes the trunk's last states of the last of them."""
    made: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _, output: Tensor | tuple) -> None:
        made[module] = output[0] if isinstance(output, tuple) else output

    hooks = [module.register_forward_hook(keep) for module in (*layers, *trunk.children())]
    try:
        last = trunk(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    # Whatever a class calls its final norm, what it made is what the trunk handed out.
    norm = next((module for module in trunk.children() if module in made and torch.equal(made[module], last)), None)
    return [made[layer] for layer in layers], norm or nn.Identity()
