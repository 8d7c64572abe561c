"""What cog writes into reference_guides/which_trainer.md: the ways from what one has to a trainer.

Each way is a row of WAYS. What the row says of the trainer is read where it is true: whether it samples from the quick facts
of its walkthrough, whether the newest release has it from reference_guides/releases.json. How many models it holds is counted
by a test that trains it (tests/test_guide_which_trainer.py).
"""

import json

from quick_reference import facts
from tables import NAMES, ROOT

WAYS = (  # what you have, the trainer, models in memory as the command starts it, flags of the command
    ("answers worth imitating", "sft", 1, ""),
    ("a larger model", "gkd", 2, ""),
    ("pairs: better, worse", "dpo", 2, ""),
    ("pairs: better, worse", "cpo", 1, ""),
    ("pairs: better, worse", "orpo", 1, ""),
    ("pairs: better, worse", "reward", 1, ""),
    ("thumbs up and down", "kto", 2, ""),
    ("thumbs up and down", "bco", 2, ""),
    ("a program that checks", "grpo", 1, ""),
    ("a program that checks", "rloo", 2, ""),
    ("a program that checks", "online_dpo", 2, "--reward_funcs exact_answer"),
    ("a reward model", "rloo", 3, "--reward_model_name_or_path REWARD_MODEL"),
    ("a reward model", "online_dpo", 3, "--reward_model_path REWARD_MODEL"),
    ("a reward model", "ppo", 4, "--reward_model_path REWARD_MODEL"),
    ("a reward model", "xpo", 3, "--reward_model_path REWARD_MODEL"),
    ("a reward model", "nash_md", 3, "--reward_model_path REWARD_MODEL"),
    ("a verdict on every step", "prm", 1, ""),
)
SAMPLES = {"off-policy": "no", "neither": "no", "on-policy": "yes", "half and half": "yes", "both": "half the time"}


def samples(name: str) -> str:
    """Whether the trainer lets the model write answers while it trains, with the settings it comes with."""
    fact = facts(name)["On-policy or off-policy"]
    return next(told for start, told in SAMPLES.items() if fact.startswith(start))


def newest_has(name: str) -> bool:
    """Whether the newest release that this repository has read still has the trainer."""
    data = json.loads((ROOT / "reference_guides" / "releases.json").read_text("utf-8"))
    _, paths = data["classes"][f"{NAMES[name]}Trainer"]["imports"][-1]
    return bool(paths)


def ways() -> None:
    """The table of all ways."""
    print("\n| You have | Trainer | Models in memory | Samples while it trains | In the newest TRL | Start |")
    print("| --- | --- | --- | --- | --- | --- |")
    for have, name, models, flags in WAYS:
        cells = [have, f"[{NAMES[name]}](../annotated_trainers/{name}.md)"]
        cells += [models, samples(name), "yes" if newest_has(name) else "no"]
        cells += [f"`{' '.join(f'python {name}.py {flags}'.split())}`"]
        print("| " + " | ".join(map(str, cells)) + " |")
    print()
