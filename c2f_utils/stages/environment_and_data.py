"""00: is this machine ready, and what does the data look like?"""

import itertools
import os
import random
import shutil

import pandas as pd
import torch

from c2f_utils.domain.problems import EOS, Problem, synthetic_answer
from c2f_utils.files import write_json
from c2f_utils.models.generated import generator
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import PROFILES
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import data

# GPU memory in GiB that a profile is laid out for; 0 = none needed.
_GPU_GIB = {"smoke": 0, "tiny": 0, "gpu_demo": 16, "small_gpu": 24, "mistral_7b": 80}
SHOWN = 4


def profiles_table(run: Run) -> pd.DataFrame:
    """One row per profile: what it works on and whether this machine can run it, with the reason if not."""
    gpus = [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(torch.cuda.device_count())]
    rows = []
    for name in PROFILES:
        settings = load_settings(name)
        needed, largest = _GPU_GIB[name], max(gpus, default=0.0)
        if largest >= needed:
            verdict = "yes"
        else:
            verdict = f"no: laid out for {needed} GiB of GPU memory, found {largest:.0f}"
        rows.append(
            {
                "profile": name + (" (chosen)" if name == run.settings.profile else ""),
                "base": settings.models.base or "pretrained here",
                "trains": "adapters" if settings.models.lora else "all weights",
                "largest limit, tokens": settings.coarse.law.maximum or settings.coarse.law.limit,
                "iterations": settings.coarse.iterations,
                "runs here": verdict,
            }
        )
    return pd.DataFrame(rows).set_index("profile")


def make(run: Run) -> dict:
    """Sizes and samples of the data; raises C2FError when a file is missing, malformed or empty."""
    here, settings = run.here, run.settings
    found = _embedded(run) if settings.embedded else _preferences(run)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    here.save_results(found)
    # Beside the results, not in them: the same settings give the same results.json on every machine.
    write_json(
        here.path("machine.json"),
        {"memory_gib": round(memory, 1), "free_disk_gib": round(shutil.disk_usage(here.dir).free / 2**30, 1)},
    )
    return found


def _embedded(run: Run) -> dict:
    settings, rng = run.settings, random.Random(run.settings.seed)
    made = generator(settings.data)
    problems = made.problems("train", SHOWN, settings.seed)
    documents = itertools.islice(made.documents(10_000, settings.seed), SHOWN)
    pairs: dict[str, list[dict]] = {"chosen": [], "rejected": []}
    for problem in problems:
        answers = [synthetic_answer(problem, rng, settings.reward.cut_share) for _ in (0, 1)]
        pair = data.labelled(problem, answers, settings.reward, rng)
        for role, ids, utility in zip(pairs, (pair.first, pair.second), pair.utilities, strict=True):
            pairs[role].append(_sample(problem, ids, utility))
    examples = itertools.islice(made.instructions(10_000, settings.instruct.worked_share, settings.seed), SHOWN)
    decode = made.vocabulary.decode
    return {
        "sizes": {
            "pretraining tokens": settings.pretrain.tokens,
            "preference pairs": settings.reward.pairs,
            "instruction tokens": settings.instruct.tokens,
            "validation problems": settings.data.validation_prompts,
            "test problems": settings.data.test_prompts,
            "words in the vocabulary": len(made.vocabulary.words),
        },
        "documents": [
            {"prompt": f"document {i + 1}", "text": decode(d), "tokens": len(d)} for i, d in enumerate(documents)
        ],
        **pairs,
        "instructions": [
            {"prompt": decode(p), "text": decode(a), "tokens": len(a), "stop": "eos"} for p, a in examples
        ],
    }


def _sample(problem: Problem, ids: list[int], utility: float) -> dict:
    stop = "eos" if ids[-1] == EOS else "limit"
    return {
        "prompt": " ".join(problem.words),
        "text": problem.vocabulary.decode(ids),
        "tokens": len(ids),
        "stop": stop,
        "utility": round(utility, 3),
    }


def _preferences(run: Run) -> dict:
    settings = run.settings
    pairs, left_out = data.preference_texts(settings)
    for path, digest in data.checksum(settings).items():
        run.here.add_input(f"data:{path}", digest)
    shown = pairs[:SHOWN]
    return {
        "sizes": {
            "preference pairs": len(pairs),
            "rows left out": left_out,
            "distinct prompts": len({p.prompt for p in pairs}),
        },
        "documents": [{"prompt": f"prompt {i + 1}", "text": p.prompt} for i, p in enumerate(shown)],
        "chosen": [{"prompt": p.prompt, "text": p.chosen} for p in shown],
        "rejected": [{"prompt": p.prompt, "text": p.rejected} for p in shown],
        "instructions": [],
    }
