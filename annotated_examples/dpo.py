# The walkthrough of TRL's implementation: annotated_trainers/dpo.md
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
"""Direct Preference Optimization (DPO): make the better of two answers more likely than the worse one.

The loss of one pair, with log-probabilities summed over the answer's tokens (Rafailov et al. 2023, arXiv 2305.18290, eq. 7):

    loss = -log sigmoid(beta * ((logp(chosen) - ref_logp(chosen)) - (logp(rejected) - ref_logp(rejected))))

One row of data:

    {"prompt":   [{"role": "user", "content": "7+9+3"}],
     "chosen":   [{"role": "assistant", "content": "7+9=16 16+3=19 #19"}],
     "rejected": [{"role": "assistant", "content": "7+9=16 16+3=20 #20"}]}

Run it:

    python dpo.py                                               # the toy world, no network, no GPU needed
    python dpo.py --model_name_or_path Qwen/Qwen3-0.6B          # a real model on a GPU
    python dpo.py --model_name_or_path ... --dataset_name ...   # your model, your data
    accelerate launch dpo.py --model_name_or_path ... --use_peft --load_in_4bit --learning_rate 1e-5

What to look at: rewards/margins rises from 0 while the loss falls from log 2 = 0.693, and the held-out answers get better.
"""

import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import load_dataset
from packaging.version import Version
from transformers import AutoTokenizer, set_seed
from transformers.utils import is_torch_bf16_gpu_available


def stop(message: str) -> None:
    """Ends the run with a message for the user. Nothing has been trained or written yet."""
    raise SystemExit(f"{Path(__file__).name}: {message}")


if Version(version("trl")) < Version("1.12.0"):
    stop(f"this script needs trl 1.12.0 or newer, and trl {version('trl')} is installed: pip install 'trl==1.12.0'")
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    is_conversational,
)

# ---------------------------------------------------------------------------------------------------------- settings
# TRL's defaults hold unless a line below changes them; a flag or a line of the YAML file behind --config overrides both.

WORLD = Path(__file__).resolve().parent / "toy"

TOY = {
    "model_name_or_path": str(WORLD / "policy"),  # 0.9M parameters: adds well, slips often (toy/README.md)
    "dataset_name": str(WORLD / "data" / "preference"),  # pairs sampled from this very policy
    "output_dir": "outputs/dpo-toy",
    "beta": 1.0,  # the pairs are never wrong, so a margin of a few nats is enough; at 0.1 the loss goes on pushing the
    # rejected answers down long after they are gone, and the chosen ones go down with them
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 16,
    "max_steps": 80,
    "logging_steps": 5,
    "max_length": 96,  # tokens of prompt and answer; the longest pair has fewer
    "gradient_checkpointing": False,  # would save memory that the toy does not need
    "bf16": False,  # float32 on every device, so that the figures can be compared
    "save_strategy": "no",  # the run is short; the model is saved at its end
}

REAL = {
    "dataset_name": "trl-lib/ultrafeedback_binarized",
    "learning_rate": 1e-6,  # for full fine-tuning; the examples of TRL take ten times more with --use_peft
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,  # 32 pairs for each step of the optimizer
    "num_train_epochs": 1,  # take more only while the held-out loss still falls
    "warmup_steps": 0.1,  # a share of all steps; the first gradients are the largest
    "lr_scheduler_type": "cosine",
    "eval_strategy": "steps",
    "eval_steps": 200,
    "bf16": is_torch_bf16_gpu_available(),  # TRL turns bf16 on by itself, which stops on a machine without such a GPU
}


def parse(command_line: list[str]):
    """Toy settings without a model name, real ones with it; then the YAML file; then the flags."""
    given = {word.split("=")[0].removeprefix("--") for word in command_line if word.startswith("--")}
    if "--config" in command_line[:-1]:
        given |= set(yaml.safe_load(Path(command_line[command_line.index("--config") + 1]).read_text()) or {})
    toy = "model_name_or_path" not in given
    if toy and given & {"dataset_name", "datasets"}:
        stop("the toy policy knows nothing but sums: with --dataset_name, give your model with --model_name_or_path")
    if toy and not WORLD.is_dir():
        stop(f"there is no toy world in {WORLD}: run this script inside its repository, or give --model_name_or_path")
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig))
    parser.set_defaults(**(TOY if toy else REAL))
    return toy, *parser.parse_args_and_config(command_line)


# -------------------------------------------------------------------------------------------------------------- data

OTHER_TYPES = {  # the columns of other kinds of data, and the script that takes them
    ("prompt", "completions", "labels"): "prm.py",
    ("prompt", "completion", "label"): "kto.py and bco.py",
    ("prompt", "completion"): "sft.py",
    ("messages",): "sft.py",
    ("text",): "sft.py",
    ("prompt",): "grpo.py, rloo.py and online_dpo.py",
}


def load_data(script_args, mixture_args):
    """All splits, from the hub, from a folder with train.jsonl (.csv, .parquet) and test.jsonl, or as a mixture."""
    if mixture_args.datasets:
        return get_dataset(mixture_args)
    name = script_args.dataset_name
    try:
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (StopIteration, OSError, ValueError) as error:
        if isinstance(error, StopIteration) or "no data" in str(error):
            stop(f"a split of the data set {name!r} is empty")
        stop(f"cannot load {name!r}, neither as a folder of data files nor from the hub: {str(error).splitlines()[0]}")


def load_split(dataset, split: str):
    """One split, after a look at its first row."""
    if split not in dataset:
        stop(
            f"there is no split {split!r}, only {sorted(dataset)}: choose with --dataset_train_split and "
            "--dataset_test_split, or do without the held-out comparison with --eval_strategy no"
        )
    first = next(iter(dataset[split]), None)
    if first is None:
        stop(f"the split {split!r} is empty")
    if not {"chosen", "rejected"} <= set(first):
        taker = next((script for columns, script in OTHER_TYPES.items() if set(columns) <= set(first)), None)
        advice = f"such rows are for {taker}" if taker else "rename or map your columns"
        stop(
            "DPO needs the columns chosen and rejected, and prompt where these two do not begin with it. "
            f"The split {split!r} has {sorted(first)}: {advice}"
        )
    return dataset[split]


def load_tokenizer(model_args, training_args, first_row):
    """The model's tokenizer, if it can render these rows and tell padding from the end of an answer."""
    name = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        stop(f"cannot load {name!r}, which is neither a model folder here nor on the hub: {str(error).splitlines()[0]}")
    if training_args.pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = training_args.pad_token
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        spare = [token for token in tokenizer.get_vocab() if re.match(r"[<\[].*(pad|reserved|unused|unk)", token)][:3]
        stop(
            f"the tokenizer of {name!r} pads with {tokenizer.pad_token!r} and ends answers with {tokenizer.eos_token!r}. "
            "DPO's masks survive that, but it is saved with the model, and whoever masks the padding next masks the end "
            "too: such a model never learns to stop. Give a token that no text holds with --pad_token"
            + (f", for example one of {spare}" if spare else "")
        )
    if is_conversational(first_row) and tokenizer.chat_template is None:
        stop(f"the rows are conversations, and the tokenizer of {name!r} has no chat template: take an instruct model")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------- held out


@torch.no_grad()
def sample(trainer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """One answer for each prompt (token ids), sampled at temperature 1."""
    set_seed(trainer.args.seed)
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model).eval()
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(**batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def held_out(trainer, problems) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """How good the policy is on data that it never trains on: figures, and a few samples as (prompt, answer)."""
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    figures = {name: metrics[f"eval_{name}"] for name in ("loss", "rewards/accuracies") if f"eval_{name}" in metrics}
    if problems is not None:  # the toy world knows the truth: the number behind the last # is the sum, or it is not
        prompts = trainer.processing_class.apply_chat_template(list(problems["prompt"]), add_generation_prompt=True)
        answers = sample(trainer, prompts["input_ids"], max_new_tokens=64)
        right = [text.endswith(f"#{truth}") for text, truth in zip(answers, problems["answer"], strict=True)]
        figures = {"right answers": sum(right) / len(right)} | figures
        return figures, [(row[-1]["content"], text) for row, text in zip(problems["prompt"], answers, strict=True)][:3]
    if trainer.eval_dataset is None:
        return figures, []
    prompts = [row["prompt_ids"] for _, row in zip(range(2), trainer.eval_dataset, strict=False)]
    answers = sample(trainer, prompts, max_new_tokens=128)
    return figures, list(zip(map(trainer.processing_class.decode, prompts), answers, strict=True))


# ---------------------------------------------------------------------------------------------------------- the run


def main() -> None:
    toy, script_args, training_args, model_args, mixture_args = parse(sys.argv[1:])
    if training_args.output_dir == "trainer_output":  # transformers' default
        training_args.output_dir = f"outputs/dpo-{Path(model_args.model_name_or_path).name}"
    output_dir, resume = Path(training_args.output_dir), training_args.resume_from_checkpoint
    if resume is not None and resume.lower() in ("true", "1", "yes"):
        resume = True  # the newest checkpoint in output_dir
    if resume and not (any(output_dir.glob("checkpoint-*")) if resume is True else Path(resume).is_dir()):
        stop(f"there is no checkpoint {f'in {output_dir}' if resume is True else resume} to go on from")
    marker = output_dir / "run.json"  # says whose run a folder holds
    earlier_toy = toy and marker.is_file() and json.loads(marker.read_text()) == {"script": "dpo.py", "toy": True}
    if output_dir.is_dir() and any(output_dir.iterdir()) and not resume and not earlier_toy:
        stop(
            f"{output_dir} holds another run. Give a new --output_dir, or go on with that run: "
            "--resume_from_checkpoint true"
        )

    # Data
    dataset = load_data(script_args, mixture_args)
    train_dataset = load_split(dataset, script_args.dataset_train_split)
    eval_dataset = None
    if training_args.eval_strategy != "no" or toy:
        eval_dataset = load_split(dataset, script_args.dataset_test_split)
    problems = load_dataset(str(WORLD / "data" / "prompt_only"), split="test") if toy else None
    tokenizer = load_tokenizer(model_args, training_args, next(iter(train_dataset)))

    # Models: the policy that is trained, and the reference that it may not leave too far behind. Without ref_model the
    # trainer loads the same weights a second time, or switches the adapter off where there is one (--use_peft).
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})

    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    say = trainer.accelerator.print

    # One row as the model sees it, and how many of the first thousand lose their end to max_length
    rows = [row for _, row in zip(range(1000), trainer.train_dataset, strict=False)]
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    limit = training_args.max_length or max(lengths, default=0)
    cut = sum(length > limit for length in lengths)
    if cut == len(lengths):
        stop(
            f"every pair is longer than max_length={limit} tokens, so no answer has an end: give a larger --max_length"
        )
    if cut:
        say(f"{cut} of the first {len(lengths)} pairs are longer than max_length={limit} tokens and lose their end.\n")
    for part in ("prompt_ids", "chosen_ids", "rejected_ids"):  # only the tokens of the two answers carry loss
        say(f"{part:13}{tokenizer.decode(rows[0][part])}")

    before, samples_before = held_out(trainer, problems)
    if trainer.accelerator.is_main_process:
        if earlier_toy and not resume:
            shutil.rmtree(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"script": "dpo.py", "toy": toy}))
    PartialState().wait_for_everyone()
    result = trainer.train(resume_from_checkpoint=resume)
    after, samples_after = held_out(trainer, problems)

    say(f"\n{result.metrics['train_runtime']:.0f} s of training. Held out:")
    for name, value in after.items():
        say(f"  {name:20}{before[name]:.3f} -> {value:.3f}")
    for (prompt, old), (_, new) in zip(samples_before, samples_after, strict=True):
        say(f"\n  {prompt}\n    before: {old}\n    after:  {new}")

    # Save
    trainer.save_model()
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        (output_dir / "held_out.json").write_text(json.dumps({"before": before, "after": after}, indent=2))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    say(f"\nThe model is in {output_dir}.")


if __name__ == "__main__":
    main()
