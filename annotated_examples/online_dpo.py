# The walkthrough of TRL's implementation: annotated_trainers/online_dpo.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl==1.12.0",
#     "transformers>=5.10.1,<5.24",
#     "datasets>=4.7,<5.3",
#     "peft>=0.20,<0.22",
#     "accelerate>=1.12,<1.16",
#     "torch>=2.11,<2.14",
#     "requests>=2.33,<3",
# ]
# ///
"""Online DPO: sample two answers to a prompt, let a reward say which is better, make that one more likely than the other.

The loss of one pair is that of DPO, with log-probabilities summed over the answer's tokens (Rafailov et al. 2023, arXiv
2305.18290, eq. 7). Only the pair is new: the policy itself has just written both answers (Guo et al. 2024, arXiv 2402.04792,
algorithm 1):

    loss = -log sigmoid(beta * ((logp(chosen) - ref_logp(chosen)) - (logp(rejected) - ref_logp(rejected))))

One row of data (only the prompt is needed; every other column reaches the reward functions under its name):

    {"prompt": [{"role": "user", "content": "7+9+3"}], "answer": "19"}

Run it:

    python online_dpo.py                                               # the toy world, no network, no GPU needed
    python online_dpo.py --reward_funcs exact_answer                   # the truth instead of the toy's reward model
    python online_dpo.py --reward_model_path outputs/reward-toy        # a reward model that reward.py has written
    python online_dpo.py --model_name_or_path Qwen/Qwen3-0.6B --reward_model_path Skywork/Skywork-Reward-V2-Qwen3-0.6B
    python online_dpo.py ... --dataset_name ...                        # your data
    python online_dpo.py ... --reward_funcs exact_answer brevity --reward_weights 1 0.1     # a reward model comes last
    python online_dpo.py ... --reward_funcs my_module.my_function      # yours, from a file my_module.py beside you
    accelerate launch online_dpo.py ... --use_peft --load_in_4bit --learning_rate 5e-6

What to look at: objective/scores rises, the mean reward of both answers, and the held-out answers get better. The loss does
not fall: it stays around log 2 = 0.693, since each step asks about two new answers. Two equal answers teach nothing,
and rewards/accuracies counts them as wrong. objective/kl and objective/entropy are sums over the padding behind the answers
too: numbers to compare, not nats.
"""

import asyncio
import importlib
import inspect
import json
import math
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import wraps
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from packaging.version import Version
from torch.random import fork_rng
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import is_torch_bf16_gpu_available
from transformers.utils.peft_utils import find_adapter_config_file


def stop(message: str) -> None:
    """Ends the run with a message for the user. Nothing has been trained or overwritten yet."""
    raise SystemExit(f"{Path(__file__).name}: {message}")


if Version(version("trl")) < Version("1.12.0"):
    stop(f"this script needs trl 1.12.0 or newer, and trl {version('trl')} is installed: pip install 'trl==1.12.0'")
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    is_conversational,
    maybe_apply_chat_template,
)
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.models.utils import unwrap_model_for_generation

# ---------------------------------------------------------------------------------------------------------- settings
# TRL's defaults hold unless a line below changes them; a flag or a line of the YAML file behind --config overrides both.


@dataclass
class Arguments(ScriptArguments):
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "exact_answer, answer_format, brevity, or dotted paths like my_module.my_function"},
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "token that fills up short rows; must differ from the end token"}
    )


SCRIPT = "online_dpo"
FLAGS = (Arguments, OnlineDPOConfig, ModelConfig, DatasetMixtureConfig)  # each of their fields is a flag
COLUMNS = ({"prompt"},)  # a row needs one of these sets; more columns do no harm
RESUMES = True  # an interrupted run can go on from its last checkpoint
WORLD = Path(__file__).resolve().parent / "toy"

TOY = {
    "model_name_or_path": str(WORLD / "policy"),  # 0.9M parameters: adds well, slips often (toy/README.md)
    "reward_model_path": str(WORLD / "reward_model"),  # gives a right answer about 6 and a wrong one about -8
    "dataset_name": str(WORLD / "data" / "prompt_only"),  # sums that it has never seen
    "output_dir": "outputs/online_dpo-toy",
    "beta": 1.0,  # holds the policy near the reference. At TRL's 0.1, one seed of three found wrong answers that the reward
    # model takes for right ones
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 32,  # prompts, with two answers each
    "max_steps": 45,
    "logging_steps": 3,
    "temperature": 1.0,  # learns what the held-out answers are sampled with; below it the slips are rare
    "max_new_tokens": 40,  # the longest right answer has 35
    "max_length": 64,  # tokens of prompt and answer
    "gradient_checkpointing": False,  # would save memory that the toy does not need
    "bf16": False,  # float32 on every device, so that the figures can be compared
    "save_strategy": "no",  # the run is short; the model is saved at its end
}

# For Qwen3-0.6B on one GPU with 80 GB; for one with 24 GB there is recipes/full_24gb.yaml
REAL = {
    "reward_model_path": None,  # this or --reward_funcs must be given
    "dataset_name": "trl-lib/ultrafeedback-prompt",
    "learning_rate": 5e-7,  # TRL's default, for full fine-tuning; ten times more with --use_peft
    "per_device_train_batch_size": 8,  # prompts. The memory goes into the logits of prompts and answers: 16 answers * 768
    # tokens * 152k words of Qwen3 * 4 bytes = 7.5 GB, several times over. Each batch is sampled by itself: 4
    # batches of 8 prompts take a quarter of the passes of 16 batches of 2
    "gradient_accumulation_steps": 4,  # 32 prompts for each step of the optimizer
    "gradient_checkpointing": False,  # with it, TRL's default, every layer is computed twice to save memory
    "max_new_tokens": 256,  # at TRL's 64 nearly every answer is cut, and the reward model compares beginnings. Look at
    # val/contain_eos_token, the share of answers that came to their end
    "max_length": 768,  # tokens of prompt and answer: 512 for the prompt; rows with longer ones are left out
    "missing_eos_penalty": 1.0,  # taken from the reward of an answer that was cut. The reward model does not see that it was:
    # it reads the answer in its own chat template, which closes it
    "num_train_epochs": 1,  # so that every prompt is new
    "warmup_steps": 0.1,  # a share of all steps
    "lr_scheduler_type": "cosine",
    "eval_strategy": "steps",  # OnlineDPOTrainer cannot evaluate; this loads the prompts for the samples before and after
    "bf16": is_torch_bf16_gpu_available(),  # TRL turns bf16 on by itself, which stops on a machine without such a GPU
}


# ---------------------------------------------------------------------------------------------------- model and trainer


def text_of(completion) -> str:
    """A completion is text where the prompt is, and a list with one message where the prompt is a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def number_in(text: str) -> float | None:
    """The number behind the last #: 19.0 for "7+9=16 16+3=19 #19", 1234.0 for "#### 1,234"."""
    found = re.findall(r"#\s*\$?(-?[\d,]*\.?\d+)(?![.,]?\d|[/^\\])", text)
    return float(found[-1].replace(",", "")) if found else None


# A reward function gets everything by name: prompts, completions, completion_ids, and each further column of the data
# set, all as lists with one entry for each answer. It returns such a list. None means: not for me to judge.


def exact_answer(completions, answer, **others) -> list[float | None]:
    """1 where the number behind the last # is that of the column `answer`, else 0; None where the column holds no number."""
    truths = [number_in(f"#{truth}") for truth in answer]
    return [
        None if truth is None else float(number_in(text_of(completion)) == truth)
        for completion, truth in zip(completions, truths, strict=True)
    ]


def answer_format(completions, **others) -> list[float]:
    """1 where the answer ends with # and a number, right or wrong."""
    return [float(bool(re.search(r"#\s*\$?-?[\d,]*\.?\d+\s*$", text_of(completion)))) for completion in completions]


def brevity(completion_ids, **others) -> list[float]:
    """Minus one for each thousand tokens: of two answers that are equally right or wrong, the shorter one is better."""
    return [-len(ids) / 1000 for ids in completion_ids]


REWARDS = {function.__name__: function for function in (exact_answer, answer_format, brevity)}


def reward_functions(script_args, columns: set[str]) -> list:
    """The functions behind --reward_funcs, if they can be called with the columns of this data set."""
    names = script_args.reward_funcs or []
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    given |= columns - {"prompt", "completion"}
    if taken := columns & {"prompts", "completions"}:
        stop(f"TRL passes {' and '.join(sorted(taken))} itself: rename or remove such columns of the data set")
    functions = []
    sys.path.insert(0, str(Path.cwd()))  # where my_module.py is
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module:
            try:
                function = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                stop(f"cannot import the reward function {name!r}: {error}")
        elif name in REWARDS:
            function = REWARDS[name]
        else:
            stop(
                f"--reward_funcs {name!r} is neither one of {sorted(REWARDS)} nor a dotted path: my_module.my_function"
            )
        try:
            inspect.signature(function).bind(**dict.fromkeys(given))
        except TypeError as error:
            stop(
                f"the reward function {name!r} gets {sorted(given)}: {error}. Rename your columns, choose others with "
                "--reward_funcs or a model with --reward_model_path; let a function take the rest as **others"
            )
        functions.append(function)
    return functions


def as_grpo_calls_it(function, tokenizer):
    """The reward function, so that one written for grpo.py does the same here.

    OnlineDPOTrainer fills completion_ids up to one length, has nowhere to log what a function wants to log, and takes None
    for 0: a pair of two None is a tie, and trained on.
    """
    name, nowhere = (
        getattr(function, "__name__", type(function).__name__),
        {"log_extra": lambda *_, **__: None, "log_metric": lambda *_, **__: None},
    )

    @wraps(function)
    def call(completion_ids, **others):
        ids = [[token for token in row if token != tokenizer.pad_token_id] for row in completion_ids]
        values = function(completion_ids=ids, **nowhere, **others)
        try:
            values = asyncio.run(values) if inspect.iscoroutine(values) else values
            values = [None if value is None else float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the reward function {name!r} has to return a list with a number or None for each answer: {error}"
            ) from error
        if len(values) != len(ids):
            raise ValueError(
                f"the reward function {name!r} returned {len(values)} values for {len(ids)} answers: one is due for each"
            )
        if any(value is not None and not math.isfinite(value) for value in values):
            raise ValueError(
                f"the reward function {name!r} returned NaN or an infinite number, and TRL would take NaN for 0: return a number, or None for "
                "both answers to a prompt that the function does not judge"
            )
        pairs = zip(values[: len(ids) // 2], values[len(ids) // 2 :], strict=True)
        if any((first is None) != (second is None) for first, second in pairs):
            raise ValueError(
                f"the reward function {name!r} returned None for one answer and a number for the other one to the same "
                "prompt. TRL would take None for 0, which beats every number below: return None for both or for none"
            )
        return values

    return call


def check_flags(script_args, training_args, model_args) -> None:
    """Stops at flags with which OnlineDPOTrainer would break off later, or train something else than was meant."""
    if script_args.reward_funcs and training_args.reward_model_path == TOY["reward_model_path"]:
        training_args.reward_model_path = None  # functions replace the toy's reward model, and add to any other
    if not script_args.reward_funcs and training_args.reward_model_path is None:
        stop(
            "nothing says which of two answers is the better one: give --reward_model_path, for example "
            "Skywork/Skywork-Reward-V2-Qwen3-0.6B or a folder that reward.py has written, or --reward_funcs"
        )
    if isinstance(training_args.beta, list):
        stop(
            "TRL breaks off at a list of betas, one for each epoch (it indexes it with 0.03): give one number to --beta"
        )
    if training_args.max_length <= training_args.max_new_tokens:
        stop(
            f"max_length={training_args.max_length} counts prompt and answer, and max_new_tokens="
            f"{training_args.max_new_tokens} leaves nothing of it for the prompt: give a larger --max_length"
        )
    if training_args.reward_model_path:
        refuse_adapter(training_args.reward_model_path)


def short_prompts(dataset, tokenizer, training_args):
    """The rows whose prompt leaves room for an answer. TRL samples from longer prompts whole, whatever max_length says."""
    limit = training_args.max_length - training_args.max_new_tokens
    with PartialState().main_process_first():
        short = dataset.filter(lambda row: len(prompt_ids(row, tokenizer)) <= limit)
    if next(iter(short), None) is None:
        stop(
            f"no prompt has at most {limit} tokens, which is what --max_length leaves beside --max_new_tokens: give a "
            "larger --max_length"
        )
    if hasattr(dataset, "__len__") and len(short) < len(dataset):
        PartialState().print(
            f"{len(dataset) - len(short)} of {len(dataset)} prompts have more than {limit} tokens and are left out.\n"
        )
    return short


def load_policy(training_args, model_args):
    """The policy. Given a name, TRL would load it with device_map="auto", which does not go with several processes."""
    quantization = get_quantization_config(model_args)
    loading = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": quantization,
        "device_map": {"": PartialState().local_process_index} if quantization else None,
        "trust_remote_code": training_args.trust_remote_code,
    } | (training_args.model_init_kwargs or {})
    return AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **loading)


def load_reward_model(training_args, model_args):
    """The reward model and its tokenizer. It may be of another family than the policy: it is given text, not tokens."""
    name, trust = training_args.reward_model_path, training_args.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=trust,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        stop(f"cannot load the reward model {name!r}, from a folder or from the hub: {str(error).splitlines()[0]}")
    if report["missing_keys"] or model.config.num_labels != 1:
        stop(
            f"{name!r} is not a reward model: it has to give one number for an answer, and "
            + ("has no weights for that, so they would be random" if report["missing_keys"] else "gives several")
            + ". reward.py trains one"
        )
    return model, tokenizer


def build(script_args, training_args, model_args, train_dataset, eval_dataset, tokenizer):
    """The policy that is trained, the reference that it may not leave too far behind, and what judges its answers.

    Rewards are added up where there are several. Of two answers with the same reward, the first one counts as the better one.
    Without ref_model the trainer copies the policy; with an adapter (--use_peft) the reference is the policy with the adapter
    switched off.
    """
    check_flags(script_args, training_args, model_args)

    # Data
    if "enable_thinking" in (tokenizer.chat_template or ""):  # Qwen3 thinks for longer than max_new_tokens
        tokenizer.chat_template = "{% set enable_thinking = false %}" + tokenizer.chat_template
    train_dataset = short_prompts(train_dataset, tokenizer, training_args)
    training_args.eval_strategy = "no"  # the trainer's evaluation stops with an error; main() has its prompts already
    # With a stream, accelerate would send each process its batches, and can send tensors only
    training_args.accelerator_config.dispatch_batches = False

    # What judges the answers. TRL passes some of its own under the names of columns.
    taken = {"messages", "prompts", "completions", "completion_ids", "trainer_state"} & set(next(iter(train_dataset)))
    train_dataset = train_dataset.remove_columns(sorted(taken))
    first_row = next(iter(train_dataset))
    rewards = [as_grpo_calls_it(function, tokenizer) for function in reward_functions(script_args, set(first_row))]
    tokenizers = [None] * len(rewards)
    if training_args.reward_model_path is not None:
        reward_model, its_tokenizer = load_reward_model(training_args, model_args)
        if is_conversational({"prompt": first_row["prompt"]}) and its_tokenizer.chat_template is None:
            stop(
                f"the prompts are conversations, and the tokenizer of the reward model {training_args.reward_model_path!r} "
                "has no chat template: take one that was trained on conversations, or save a template with it"
            )
        rewards.append(reward_model)
        tokenizers.append(its_tokenizer)

    # The policy
    policy = load_policy(training_args, model_args)
    training_args.model_init_kwargs = None  # the trainer refuses them beside a model
    if not training_args.use_vllm:  # TRL samples without a cache wherever it checkpoints gradients, and need not
        training_args.generation_kwargs = {"use_cache": True} | (training_args.generation_kwargs or {})
    set_seed(training_args.seed)  # an adapter starts from random numbers
    trainer = OnlineDPOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        reward_processing_classes=tokenizers,
        peft_config=get_peft_config(model_args),
    )
    # TRL divides the logged loss by this number, and not the gradient: without it, --max_grad_norm would clip sums
    trainer.accelerator.gradient_accumulation_steps = training_args.gradient_accumulation_steps
    return trainer


def sample_pairs(trainer, rows: list[dict]) -> tuple[list[list[int]], list[list[int]]]:
    """First answers and second answers to these rows, as token ids, with training's temperature, top_p and top_k."""
    args, tokenizer = trainer.args, trainer.processing_class
    prompts = 2 * [prompt_ids(row, tokenizer) for row in rows]
    gpus = [args.device] if args.device.type == "cuda" else []
    with (
        fork_rng(gpus),
        torch.no_grad(),
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
    ):
        torch.manual_seed(args.seed)
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        drawing = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        output = model.eval().generate(**batch, **drawing, max_new_tokens=args.max_new_tokens)
    answers, cut = output[:, batch["input_ids"].shape[1] :].tolist(), 0
    for index, answer in enumerate(answers):
        if tokenizer.eos_token_id in answer:
            answers[index] = answer[: answer.index(tokenizer.eos_token_id) + 1]
        else:
            cut += 1
    if cut == len(answers):
        stop(
            f"none of {cut} answers has {tokenizer.eos_token!r} within max_new_tokens={args.max_new_tokens} tokens, and TRL knows "
            "no other end: give a larger --max_new_tokens, or a model whose tokenizer has the end of a turn as its eos_token"
        )
    if cut:
        trainer.accelerator.print(
            f"{cut} of {len(answers)} sampled answers were cut at {args.max_new_tokens} tokens.\n"
        )
    return answers[: len(rows)], answers[len(rows) :]


def show_row(trainer) -> None:
    """Prints one pair as training will see it, after a look at two answers to each of the first eight prompts.

    That costs less than sampling for one step, and shows what would otherwise show after hours: answers that are all cut
    before their end, and reward functions that score nothing.
    """
    say, tokenizer = trainer.accelerator.print, trainer.processing_class
    rows = list(islice(trainer.train_dataset, 8))
    first, second = sample_pairs(trainer, rows)
    rewards = look_at_rewards(trainer, 2 * rows, first + second)
    total = rewards["reward"]
    margins = [one - other for one, other in zip(total[: len(rows)], total[len(rows) :], strict=True)]
    say(f"{margins.count(0)} of {len(rows)} sampled pairs have two answers with the same reward.\n")
    index = max(range(len(rows)), key=lambda index: abs(margins[index]))
    pair = [(first[index], index), (second[index], index + len(rows))]
    (chosen, its), (rejected, others) = pair if margins[index] >= 0 else pair[::-1]
    say(f"{'prompt_ids':16}{tokenizer.decode(prompt_ids(rows[index], tokenizer))}")
    for column in sorted(set(rows[index]) - {"prompt"}):  # for the reward functions; the model does not see it
        say(f"{column:15} {rows[index][column]}")
    say(f"{'chosen':16}{tokenizer.decode(chosen)}")  # only the tokens of the two answers carry loss
    say(f"{'rejected':16}{tokenizer.decode(rejected)}")
    for name, values in rewards.items():
        say(f"{name:15} {values[its]} {values[others]}")


@torch.no_grad()
def look_at_rewards(trainer, rows: list[dict], answers: list[list[int]]) -> dict[str, list[float | None]]:
    """What each reward function and the reward model give to these answers, called as the trainer calls them, and the sum."""
    args, chat = trainer.args, is_conversational({"prompt": rows[0]["prompt"]})
    texts = trainer.processing_class.batch_decode(answers, skip_special_tokens=True)
    prompts = [row["prompt"] for row in rows]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    columns |= {"completion_ids": answers, "trainer_state": trainer.state}
    rewards = {}
    for name, function, reader in zip(
        trainer.reward_func_names, trainer.reward_funcs, trainer.reward_processing_classes, strict=True
    ):
        name = name if name not in rewards else f"{name} {len(rewards) + 1}"  # two functions may have one name
        if isinstance(function, torch.nn.Module):
            whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            if chat:
                whole = [reader.apply_chat_template(messages, tokenize=False) for messages in whole]
            batch = reader(whole, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
            rewards[name] = [round(score, 2) for score in function(**batch.to(args.device)).logits[:, 0].tolist()]
            continue
        try:
            rewards[name] = function(prompts=prompts, completions=completions, **columns)
        except ValueError as error:
            stop(str(error))
    if all(set(values) == {None} for values in rewards.values()):
        stop(
            f"no reward function scored any of {len(rows)} sampled answers, all returned None. None is for answers that "
            "another function scores; for exact_answer, the column answer must hold numbers"
        )
    weights = args.reward_weights or [1.0] * len(rewards)
    total = [
        sum(w * (v or 0.0) for w, v in zip(weights, values, strict=True))
        for values in zip(*rewards.values(), strict=True)
    ]
    penalty, end = args.missing_eos_penalty or 0.0, trainer.processing_class.eos_token_id
    total = [value - penalty * (end not in answer) for value, answer in zip(total, answers, strict=True)]
    return rewards | {"reward": total}


# ----------------------------------------------------------------------------------------------------------- held out

FIGURES = ()  # OnlineDPOTrainer cannot evaluate


def prompt_ids(row: dict, tokenizer) -> list[int]:
    """The tokens of a row up to the point where the answer begins, as in training: plain text gets no BOS."""
    text = maybe_apply_chat_template({"prompt": row["prompt"]}, tokenizer)["prompt"]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def sample(trainer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """One answer for each prompt (token ids), sampled at temperature 1. Training draws as if nobody had looked."""
    tokenizer, gpus = trainer.processing_class, [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with fork_rng(gpus), unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        torch.manual_seed(trainer.args.seed)
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        drawing = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        output = model.eval().generate(**batch, **drawing, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def held_out(trainer, rows: list[dict], toy: bool) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """How good the policy is on data that it never trains on: figures, and a few samples as (prompt, answer)."""
    metrics = trainer.evaluate() if FIGURES and trainer.eval_dataset is not None else {}
    figures = {name: metrics[f"eval_{name}"] for name in FIGURES if metrics.get(f"eval_{name}") is not None}
    if toy:
        rows = list(load_dataset(str(WORLD / "data" / "prompt_only"), split="test"))
    rows = [row for row in rows if {"messages", "prompt"} & set(row)]  # plain text has no prompt
    if not rows:
        return figures, []
    prompts = [prompt_ids(row, trainer.processing_class) for row in rows]
    answers = sample(trainer, prompts, max_new_tokens=64 if toy else 256)
    if toy:  # the toy world knows the truth: the number behind the last # is the sum, or it is not
        right = [answer.endswith(f"#{row['answer']}") for answer, row in zip(answers, rows, strict=True)]
        figures = {"right answers": sum(right) / len(right)} | figures
    texts = trainer.processing_class.batch_decode(prompts[:3], skip_special_tokens=True)
    return figures, list(zip(texts, answers[:3], strict=True))


# ------------------------------------------------------------------------------------------------------------ the run
# From here on the fifteen scripts are the same to the letter.


def parse(command_line: list[str]):
    """Toy settings for the toy policy and for what was trained from it, real ones else; the YAML file; the flags."""
    # TrlParser knows --config FILE, and not --config=FILE
    command_line = [part for word in command_line for part in re.split("(?<=^--config)=", word)]
    flags = {}
    for word, following in zip(command_line, [*command_line, ""][1:], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name.replace("-", "_")] = value if equals else following  # both spellings are flags
    given = (read_config(flags["config"]) if "config" in flags else {}) | flags
    model = given.get("model_name_or_path")
    toy = model is None or is_toy_run(Path(model))
    if model is None and {"dataset_name", "datasets"} & set(given):
        stop("the toy policy knows nothing but sums: with --dataset_name, give your model with --model_name_or_path")
    if toy and not WORLD.is_dir() and not {"-h", "--help"} & set(command_line):
        stop(f"there is no toy world in {WORLD}: run this script inside its repository, or give --model_name_or_path")
    parser = TrlParser(FLAGS, allow_abbrev=False)  # half of a name would pass by the choice of settings above
    parser.set_defaults(**(TOY if toy else REAL))
    return toy, *parser.parse_args_and_config(command_line)


TAKERS = {  # columns -> the scripts for such rows
    ("prompt", "completions", "labels"): "prm.py",
    ("prompt", "completion", "label"): "kto.py and bco.py",
    ("chosen", "rejected"): "dpo.py, cpo.py, orpo.py and reward.py",
    ("prompt", "completion"): "sft.py and gkd.py",
    ("messages",): "sft.py and gkd.py",
    ("text",): "sft.py",
    ("prompt",): "grpo.py, rloo.py, ppo.py, online_dpo.py, nash_md.py and xpo.py",
}


def read_config(name: str) -> dict:
    """The flags of a YAML file. TrlParser reads it again, and does not say what is wrong with it."""
    try:
        found = yaml.safe_load(Path(name).read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        stop(f"cannot read --config {name}: {error}")
    if not isinstance(found, dict):
        stop(f"--config {name} is not a list of flags: it needs lines like `learning_rate: 1.0e-6`")
    if found.get("eval_strategy") is False:
        stop(f'--config {name}: YAML reads no as false, so write eval_strategy: "no"')
    return found


def is_toy_run(folder: Path) -> bool:
    """Whether a run of one of these scripts on the toy world has written this folder."""
    return (folder / "run.json").is_file() and json.loads((folder / "run.json").read_text())["toy"]


def says_empty(error: Exception) -> bool:
    """Whether an error means a file without rows: the reader of each format has its own words for that."""
    words = ("no data", "first 0 values", "No columns to parse")
    return isinstance(error, StopIteration) or any(part in str(error.__cause__ or error) for part in words)


def load_data(script_args, mixture_args):
    """All splits, from the hub, from a folder with train.jsonl (.csv, .parquet) and test.jsonl, or as a mixture."""
    if mixture_args.datasets and mixture_args.streaming and mixture_args.test_split_size:
        stop("a stream has no known end to cut a test split from: leave out streaming or test_split_size")
    name = script_args.dataset_name
    if Path(name).is_file():
        stop(f"{name!r} is a file: give its folder, in which the files of the splits are called train and test")
    try:
        if mixture_args.datasets:
            name = "the mixture"
            return get_dataset(mixture_args)
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (StopIteration, OSError, ValueError, DatasetGenerationError) as error:
        if says_empty(error):
            stop(f"a split of the data set {name!r} is empty")
        lines = str(error.__cause__ or error).splitlines() or [""]
        reason = " ... ".join(dict.fromkeys((lines[0], lines[-1])))
        stop(f"cannot load {name!r}, neither as a folder of data files nor from the hub: {reason}")


def load_split(dataset, split: str):
    """One split, after a look at its first row."""
    if split not in dataset:
        stop(
            f"there is no split {split!r}, only {sorted(dataset)}: choose with --dataset_train_split and "
            "--dataset_test_split (a mixture makes one with test_split_size), or do without the held-out comparison with "
            "--eval_strategy no"
        )
    try:
        first = next(iter(dataset[split]), None)
    except ValueError as error:  # a stream opens its file only here
        if not says_empty(error):
            raise
        first = None
    if first is None:
        stop(f"the split {split!r} is empty")
    columns = next((columns for columns in COLUMNS if columns <= set(first)), None)
    if columns is None:
        taker = next((scripts for columns, scripts in TAKERS.items() if set(columns) <= set(first)), None)
        stop(
            f"a row needs the columns {' or '.join(' + '.join(sorted(columns)) for columns in COLUMNS)}, and the split "
            f"{split!r} has {sorted(first)}: {f'such rows are for {taker}' if taker else 'rename or map your columns'}"
        )
    for name in sorted({"prompt", *columns} & set(first)):
        value, table = first[name], getattr(dataset[split], "data", None)  # a stream has no table
        if value is None or (table and table.column(name).null_count):
            row = table.column(name).is_null().index(True).as_py() if table else 0
            stop(f"row {row} of the split {split!r} has None in the column {name!r}: leave such rows out, or fill them")
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            stop(f"the column {name!r} holds messages as one text: read them with json.loads, save them as JSON Lines")
        keys = set(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else None
        if keys is not None and not {"role", "content"} <= keys:
            stop(f"a message needs role and content, and those of {name!r} have {sorted(keys)}: rename them")
    if "chosen" in columns and "prompt" not in first and SCRIPT != "reward":  # RewardTrainer can do without a prompt
        answer = (
            first["chosen"] if isinstance(first["chosen"], str) else " ".join(str(part) for part in first["chosen"])
        )
        asked = [
            name for name in ("question", "instruction", "query", "input") if str(first.get(name, answer)) not in answer
        ]
        if asked or first["chosen"][:1] != first["rejected"][:1]:
            remedy = f"is yours in {asked}? Then rename that" if asked else "these have none, so add one"
            stop(f"without a column prompt, what chosen and rejected begin with alike is the prompt: {remedy}")
    if "chosen" in columns and isinstance(first["chosen"], list):
        # HuggingFaceH4/ultrafeedback_binarized has the prompt also as a text, and the chosen conversation also as messages;
        # TRL looks at any one column to learn whether rows are conversations
        twice = {"messages", "completion"} | ({"prompt"} if isinstance(first.get("prompt"), str) else set())
        if "prompt" in twice and not any(message["role"] == "user" for message in first["chosen"]):
            stop("the prompt is a text, and the answers are messages without it: make the prompt a list of messages")
        return dataset[split].remove_columns(sorted(twice & set(first)))
    return dataset[split]


def refuse_adapter(name: str) -> None:
    """Stops if a folder or a repository is an adapter: transformers would freeze it with its base, or not know it."""
    try:
        found = find_adapter_config_file(name)
    except OSError:  # one that is not there is none; the loading says so
        return
    if found:
        kind, more = {
            "SEQ_CLS": ("SequenceClassification", ", num_labels=1"),
            "TOKEN_CLS": ("TokenClassification", ", num_labels=2"),
        }.get(json.loads(Path(found).read_text()).get("task_type"), ("CausalLM", ""))
        stop(
            f"{name!r} holds an adapter and not a whole model. Merge it into its base: peft.AutoPeftModelFor{kind}"
            f".from_pretrained({name!r}{more}).merge_and_unload(), then save_pretrained(FOLDER) of that and of the adapter's "
            "tokenizer (its pad_token_id belongs into the model's config too), and give FOLDER"
        )


def load_tokenizer(script_args, training_args, model_args, first_row):
    """The model's tokenizer, if it can render these rows and tell padding from the end of an answer."""
    name = model_args.model_name_or_path
    refuse_adapter(name)
    if (Path(name) / "config.json").is_file() and not any(Path(name).glob("*token*")):
        stop(
            f"there is a model in {name} and no tokenizer: save it there too, with tokenizer.save_pretrained({name!r})"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=model_args.model_revision,
            trust_remote_code=getattr(training_args, "trust_remote_code", False),
        )
    except (OSError, ValueError) as error:
        stop(f"cannot load {name!r}, which is neither a model folder here nor on the hub: {str(error).splitlines()[0]}")
    vocabulary, pad_token = tokenizer.get_vocab(), (vars(script_args) | vars(training_args)).get("pad_token")
    if pad_token is not None and pad_token not in vocabulary:
        stop(f"--pad_token {pad_token!r} is not a token of {name!r}")
    tokenizer.eos_token = getattr(training_args, "eos_token", None) or tokenizer.eos_token
    tokenizer.pad_token = pad_token or tokenizer.pad_token
    if tokenizer.eos_token_id is None:
        stop(f"the tokenizer of {name!r} has no token that ends an answer (eos_token): set one and save it again")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        spare = [token for token in vocabulary if re.match(r"[<\[].*(pad|reserved|unused|unk)", token)][:3]
        stop(
            f"the tokenizer of {name!r} pads with {tokenizer.pad_token!r} and ends answers with {tokenizer.eos_token!r}: "
            "many trainers mask the end with the padding, and such a model never learns to stop. Give a token that no "
            "text holds with --pad_token" + (f", for example one of {spare}" if spare else "")
        )
    columns = {name: value for name, value in first_row.items() if not isinstance(value, str)}  # a text beside messages
    template = getattr(training_args, "chat_template_path", None)  # a file, or a model whose template the trainer takes
    if template and Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text("utf-8")
    if is_conversational(columns) and tokenizer.chat_template is None and template is None:
        stop(f"the rows are conversations, and the tokenizer of {name!r} has no chat template: take an instruct model")
    parts = [columns.get(part) or [] for part in ("messages", "prompt", "chosen", "completion")]
    if tokenizer.chat_template and is_conversational(columns) and all(isinstance(part, list) for part in parts):
        try:
            tokenizer.apply_chat_template(
                parts[0] or [message for part in parts[1:] for message in part], tokenize=False
            )
        except Exception as error:  # a template stops in its own words
            stop(f"the chat template of {name!r} cannot render the first row: {error}")
    return tokenizer


def check_folder(toy: bool, training_args, model_args) -> Path | None:
    """Makes sure that output_dir can be written and holds nobody else's run; the checkpoint to go on from, if asked for."""
    if training_args.output_dir == "trainer_output":  # transformers' default
        training_args.output_dir = f"outputs/{SCRIPT}-{Path(model_args.model_name_or_path).name}"
    output_dir, resume = Path(training_args.output_dir), training_args.resume_from_checkpoint
    if resume and not RESUMES:
        stop("this trainer cannot resume a run: start again without --resume_from_checkpoint, in a new --output_dir")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        stop(f"cannot write to {output_dir}: {error.strerror}")
    owner, files = {"script": SCRIPT, "toy": toy}, {path.name for path in output_dir.iterdir()}
    if resume and str(resume).lower() not in ("false", "0", "no"):
        newest = str(resume).lower() in ("true", "1", "yes")
        found = output_dir.glob("checkpoint-*") if newest else [Path(resume)]
        whole = [folder for folder in found if (folder / "trainer_state.json").is_file()]  # the file written last
        if not whole:
            stop(f"there is no whole checkpoint in {output_dir if newest else resume} to go on from")
        checkpoint = max(whole, key=lambda folder: int(folder.name.split("-")[-1])) if newest else whole[0]
        if (marker := checkpoint.parent / "run.json").is_file() and json.loads(marker.read_text()) != owner:
            stop(f"{checkpoint} belongs to another run, of {json.loads(marker.read_text())['script']}.py")
        if files and checkpoint.resolve().parent != output_dir.resolve():
            stop(f"{output_dir} holds another run, which this one would replace: give a new --output_dir")
        return checkpoint
    if Path(model_args.model_name_or_path).resolve() == output_dir.resolve():
        stop(f"{output_dir} holds the model to begin with, and this run would replace it: give a new --output_dir")
    marker = output_dir / "run.json"
    mine = marker.is_file() and json.loads(marker.read_text()) == owner
    if files and not (mine and (toy or files <= {"run.json", "runs"})):  # a toy run may replace its predecessor
        go_on = RESUMES and any(name.startswith("checkpoint-") for name in files)
        stop(
            f"{output_dir} holds another run. Give a new --output_dir"
            + (", or go on with that run: --resume_from_checkpoint true" if go_on else "")
        )
    return None


def start(output_dir: Path, toy: bool, resume: Path | None) -> None:
    """Clears away an earlier toy run, and says whose folder this is from now on."""
    if toy and not resume:
        shutil.rmtree(output_dir)
        output_dir.mkdir()
    (output_dir / "run.json").write_text(json.dumps({"script": SCRIPT, "toy": toy}))


def save(trainer, output_dir: Path) -> None:
    """Writes the model beside its place and moves it there when it is whole: a full disk leaves no half of a model."""
    unfinished, main_process = output_dir / "unfinished", trainer.accelerator.is_main_process
    push, trainer.args.push_to_hub = trainer.args.push_to_hub, False  # or save_model uploads the unfinished folder
    try:
        trainer.save_model(str(unfinished))  # in every process: each may hold a part of the weights
        for path in unfinished.iterdir() if main_process else ():
            path.replace(output_dir / path.name)
    finally:
        trainer.args.push_to_hub = push
        if main_process:
            shutil.rmtree(unfinished, ignore_errors=True)


def main() -> None:
    toy, script_args, training_args, model_args, mixture_args = parse(sys.argv[1:])
    resume = check_folder(toy, training_args, model_args)
    output_dir = Path(training_args.output_dir)

    # Data
    dataset = load_data(script_args, mixture_args)
    train_dataset = load_split(dataset, script_args.dataset_train_split)
    eval_dataset = None
    if toy or training_args.eval_strategy != "no":
        eval_dataset = load_split(dataset, script_args.dataset_test_split)
    rows = list(islice(eval_dataset or (), 2))
    tokenizer = load_tokenizer(script_args, training_args, model_args, next(iter(train_dataset)))

    # Model and trainer
    trainer = build(script_args, training_args, model_args, train_dataset, eval_dataset, tokenizer)
    say = trainer.accelerator.print
    show_row(trainer)

    # Train, with a look at the held-out data before and after
    before, samples_before = held_out(trainer, rows, toy)
    if trainer.accelerator.is_main_process:
        start(output_dir, toy, resume)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.num_processes > 1:
        # evaluate() marks the model as prepared; train() would not wrap it, and each process train a model of its own
        trainer.model._is_accelerate_prepared = False
    started = time.perf_counter()
    trainer.train(**({"resume_from_checkpoint": str(resume)} if resume else {}))
    seconds = time.perf_counter() - started
    save(trainer, output_dir)  # before the second look: whatever that meets, the model is safe
    after, samples_after = held_out(trainer, rows, toy)

    # Report
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        result = {"seconds": seconds, "before": before, "after": after}
        (output_dir / "held_out.json").write_text(json.dumps(result, indent=2))
    say(f"\n{seconds:.0f} s of training. Held out:")
    for name in [name for name in before if name in after]:
        say(f"  {name:20}{before[name]:.3f} -> {after[name]:.3f}")
    for (prompt, old), (_, new) in zip(samples_before, samples_after, strict=True):
        say(f"\n  {prompt}\n    before: {old}\n    after:  {new}")
    if training_args.push_to_hub:  # the model card names data sets of the hub: it refuses the path of a folder
        on_hub = not mixture_args.datasets and not Path(script_args.dataset_name).exists()
        trainer.push_to_hub(dataset_name=script_args.dataset_name if on_hub else None)
    say(f"\nThe model is in {output_dir}.")


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"{error}\n{Path(__file__).name}: the memory of the GPU is full. What helps: --gradient_checkpointing true; a "
            "smaller --per_device_train_batch_size, with as much more --gradient_accumulation_steps; shorter rows; "
            "--use_peft. All of it together: annotated_examples/recipes, for cards with 24 GB"
        ) from error
