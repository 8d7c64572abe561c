"""What the tests of several walkthroughs share: reading a page, tiny models and their tokenizer, short runs, comparisons.

A helper that one walkthrough alone needs stands in its own test file. Fixtures come from functions here, so that a test file
shows in one line what it has: `page = page_of(PAGE)`.
"""

import functools
import inspect
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from datasets import Dataset
from markdown_pages import FORMULA, ROOT, fences, ran
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig
from trl.experimental.online_dpo import OnlineDPOTrainer

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()

PAGES = ROOT / "annotated_trainers"
EXAMPLES = ROOT / "annotated_examples"
EXPECTED = EXAMPLES / "expected"

CHECKPOINTING = "activation_checkpointing"  # its name since transformers 5.20
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
LOG2 = math.log(2)
PAD, END = 0, 1  # of the tokenizer

# --- a page ---------------------------------------------------------------------------------------------------------------


def page_of(path: Path):
    """A fixture: the names that the blocks of a page leave behind, for the tests that only look."""

    @pytest.fixture(scope="module")
    def page():
        return ran(path).namespace

    return page


def prose(path: Path) -> str:
    """A page with white space made single, so that a sentence is found wherever its lines break."""
    return " ".join(path.read_text("utf-8").split())


def section_of(path: Path, title: str) -> str:
    """The text of a section of a page, with the sections below it."""
    head, _, text = path.read_text("utf-8").partition(f"# {title}\n")
    assert text, f"{path.name} has no section {title!r}"
    level = len(head) - len(head.rstrip("#")) + 1
    return re.split(rf"^#{{1,{level}}} ", text, maxsplit=1, flags=re.M)[0]


def first_cells(text: str) -> list[list[str]]:
    """The rows of the tables in a text whose first cell is code, cell by cell."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in text.split("\n")]
    return [cells for cells in rows if len(cells) > 1 and re.fullmatch(r"`[^`]+`( \(default\))?", cells[0])]


def metrics_on(path: Path) -> dict[str, str]:
    """The table below "Logged metrics": the key of a metric -> what it is."""
    return {cells[0].strip("`"): cells[1] for cells in first_cells(section_of(path, "Logged metrics").split("###")[0])}


def formula_names(path: Path) -> list[str]:
    """The names of a page's formulas. Each stands right above its formula, and the next block defines its function."""
    lines, names = path.read_text("utf-8").split("\n"), []
    for fence in fences(path):
        if fence.lang == "math":
            above = [line for line in lines[fence.line - 3 : fence.line - 1] if FORMULA.search(line)]
            assert len(above) == 1, fence.where
            names.append(FORMULA.search(above[0])[1].strip())
            block = next(f for f in fences(path) if f.line > fence.line and f.lang == "python")
            assert f"def {names[-1].replace('-', '_')}(" in block.text
    return sorted(names)


def named_tests(path: Path) -> set[str]:
    return set(re.findall(r"\btest_\w+", path.read_text("utf-8"))) - {f"test_walkthrough_{path.stem}"}


def defaults_on(path: Path, args) -> tuple[list, list]:
    """The defaults that a page quotes, (name, value) by (name, value), and what these arguments have under their names."""
    quoted = re.findall(r"`(\w+)`\s\(default\s([^;,)]+)", path.read_text("utf-8"))
    return (
        [(name, value.strip('"`')) for name, value in quoted],
        [(name, str(getattr(args, name)).replace("\n", r"\n")) for name, _ in quoted],
    )


def arguments_of(trainer: type, config: type) -> set[str]:
    """Everything that a trainer and its config can be given."""
    return {*config.__dataclass_fields__, *inspect.signature(trainer.__init__).parameters}


def parents_sampling_alone_reads(config: type, module, *settings: str) -> None:
    """Settings of a config that its trainer, a child of OnlineDPOTrainer, inherits and never comes to: it samples by itself."""
    source = inspect.getsource(module)
    assert "._generate(" not in source
    for setting in settings:
        assert setting in config.__dataclass_fields__ and setting not in source
        methods = {name: of for name, of in vars(OnlineDPOTrainer).items() if callable(of)}
        assert [name for name, of in methods.items() if setting in inspect.getsource(of)] == ["_generate"]


def functions_of(path: Path, *names: str) -> dict:
    """Functions of another page, from the blocks that define them."""
    found: dict = {"torch": torch, "F": torch.nn.functional}
    for name in names:
        (block,) = [f for f in fences(path) if f.lang == "python" and re.search(rf"^def {name}\(", f.text, re.M)]
        exec(block.text, found)
    return found


# --- comparisons ----------------------------------------------------------------------------------------------------------


def comparisons():
    """For a test file: its relative errors, `agree`, which adds one to them, and the fixture that prints the largest."""
    errors: list[float] = []

    def agree(ours, theirs) -> float:
        ours, theirs = (torch.as_tensor(value).detach().double() for value in (ours, theirs))
        assert ours.shape == theirs.shape
        errors.append(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)))
        assert errors[-1] < 1e-5
        return errors[-1]

    return errors, agree, _summary_of(errors)


def comparisons_of_norms():
    """The same for the sums of policy gradients. A loss with two signs may nearly cancel: its error is relative to 0.1."""
    errors: list[float] = []

    def agree(ours, theirs, what="") -> None:
        ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
        errors.append(float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12 if theirs.ndim else 0.1)))
        assert errors[-1] < 1e-5, f"{what}: relative error {errors[-1]}"

    return errors, agree, _summary_of(errors)


def _summary_of(errors: list[float]):
    @pytest.fixture(scope="module", autouse=True)
    def summary():
        yield
        print(f"\n{len(errors)} comparisons with TRL, largest relative error {max(errors, default=0):.1e}")

    return summary


def checked_formulas():
    """For a test file: the functions called, formula name -> the test that compares it, and `checks`, which marks that test.

    A marked test fails if it did not call one of its formulas; calling is noted by who hands out the functions of the page.
    """
    called: set[str] = set()
    checked: dict[str, str] = {}

    def checks(*names):
        def decorate(test):
            checked.update(dict.fromkeys(names, test.__name__))

            @functools.wraps(test)
            def run(*args, **kwargs):
                called.clear()
                test(*args, **kwargs)
                missing = {name.replace("-", "_") for name in names} - called
                assert not missing, f"{test.__name__} never computed {sorted(missing)}"

            return run

        return decorate

    return called, checked, checks


def noting(called: set[str]):
    """A fixture: the functions of the page by name; calling one is noted in `called`, for `checks`."""

    class Functions(dict):
        def __getitem__(self, name):
            function = super().__getitem__(name)
            if not callable(function):
                return function

            @functools.wraps(function)
            def noted(*args, **kwargs):
                called.add(name)
                return function(*args, **kwargs)

            return noted

    @pytest.fixture
    def functions(page):
        return Functions(page)

    return functions


# --- a tokenizer and models -----------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, pad: str | None = "<|pad|>", merges=(), more=(), bos=None):
    """One token per character, plus `merges`: 0 fills up, 1 ends, 2 and 3 are headers, all others are text."""
    characters = sorted(set("0123456789+=# abcdefghijklmnopqrstuvwxyz"))
    vocab = {t: i for i, t in enumerate(["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", *characters, *more])}
    core = Tokenizer(models.BPE(vocab, list(merges)))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token="<|end|>",
        bos_token=bos,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=template,
    )


VOCABULARY = len(tokenizer())


def config(**more) -> dict:
    """The settings of a Qwen3 model of two layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": END, **sizes, **heads, **more}


def save(model, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def model_folder(**more):
    """A fixture: a random model of two layers on disk, with the tokenizer."""

    @pytest.fixture(scope="module")
    def checkpoint(tmp_path_factory) -> str:
        torch.manual_seed(0)
        return save(Qwen3ForCausalLM(Qwen3Config(**config(**more))), tmp_path_factory.mktemp("model"))

    return checkpoint


def experts(**more) -> Qwen3MoeForCausalLM:
    """A random model with a mixture of experts."""
    torch.manual_seed(0)
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config(**own, **more)))


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    special = {"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": END}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **special))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=END, **sizes))


def reward_model(**more) -> Qwen3ForSequenceClassification:
    torch.manual_seed(1)
    return Qwen3ForSequenceClassification(Qwen3Config(**config(num_labels=1, pad_token_id=PAD, **more)))


def changed(model, by=0.05):
    """The same model with other weights: what merging an adapter leaves in memory."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(by * torch.randn(weight.shape, generator=generator))
    return model


def raise_logits(model, by: float) -> None:
    """Adds a constant to all logits."""
    forward = model.forward

    def raised(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits + by
        return outputs

    model.forward = raised


def calls_of(model) -> list[SimpleNamespace]:
    """What a model is called with from now on."""
    seen = []

    def hook(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        grad = torch.is_grad_enabled()
        seen.append(SimpleNamespace(shape=tuple(ids.shape), training=module.training, gradient=grad, kwargs=kwargs))

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


# --- short runs -----------------------------------------------------------------------------------------------------------


def settings_for(folder: Path, **more) -> dict:
    """The settings of a short run on the CPU that saves nothing."""
    if "gradient_checkpointing" not in more:  # the older name still works
        more.setdefault(CHECKPOINTING, False)
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
        **more,
    }


def make_trainer(trainer: type, config: type, folder: Path, rows, **more):
    """A trainer for a short run; keyword arguments of the trainer go there, all others to its config."""
    own = {name: more.pop(name) for name in inspect.signature(trainer.__init__).parameters if name in more}
    if isinstance(own.get("eval_dataset"), list):
        own["eval_dataset"] = Dataset.from_list(own["eval_dataset"])
    made = trainer(
        args=config(**settings_for(folder, **more)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=own.pop("processing_class", None) or tokenizer(),
        **own,
    )
    made.remove_callback(PrinterCallback)
    return made


def made_once(**settings):
    """A fixture: what `make` makes, once for a test file, for the tests that leave it as it is."""

    @pytest.fixture(scope="module")
    def shared(make):
        return make(**settings)

    return shared


def made_and_trained(**settings):
    """A fixture: a trainer after its steps, with its log, for the tests that only look."""

    @pytest.fixture(scope="module")
    def trained_once(make):
        trainer = make(**settings)
        trainer.train()
        return trainer

    return trained_once


def trained(trainer, **more) -> list[dict]:
    """Trains, and returns the log lines of the training steps."""
    trainer.train(**more)
    return [line for line in trainer.state.log_history if "loss" in line]


def batch_of(trainer, rows=range(4)) -> dict:
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def loss_of(trainer, batch: dict) -> float:
    trainer.model.eval()
    return float(trainer._compute_loss(trainer.model, batch, return_outputs=False).detach())


def random_ids(dice: torch.Generator, low: int, high: int, vocabulary: int) -> list[int]:
    """Between `low` and `high` tokens of text, from a vocabulary of this size."""
    length = int(torch.randint(low, high, (1,), generator=dice))
    return torch.randint(4, vocabulary, (length,), generator=dice).tolist()


# --- rows of pairs, and of answers with a label ---------------------------------------------------------------------------


def pair(question: str, good: str, bad: str) -> dict:
    """One row of a conversational preference data set."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }


PAIRS = [
    pair("1+2", "1+2=3 #3", "1+2=4 #4"),
    pair("7+12", "7+12=19 #19", "7+12=18 #18"),
    pair("2+2", "2+2=4 #4", "2+2=5 #5 or so"),
    pair("5+5", "5+5=10 #10", "5+5=1 #1"),
]


def labelled(question: str, answer: str, label) -> dict:
    """One row of a conversational unpaired preference data set."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "label": label,
    }


LABELLED = [
    labelled("1+2", "1+2=3 #3", True),
    labelled("7+12", "7+12=18 #18", False),
    labelled("2+2", "2+2=4 #4", True),
    labelled("5+5", "5+5=1 #1 or so", False),
]

# --- CPO and ORPO, which tokenize a pair alike ----------------------------------------------------------------------------


def text(prompt: str, chosen: str, rejected: str) -> dict:
    """One row of a preference data set of plain text."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


LOPSIDED = text("1" * 20, "2" * 59, "3" * 9)  # at a max_length of 50 nothing is left of the rejected answer


def repeated(question: str) -> dict:
    prompt = [{"role": "user", "content": "1+2"}]
    answers = {kind: [*prompt, {"role": "assistant", "content": kind}] for kind in ("chosen", "rejected")}
    return {"prompt": question, **answers}


def random_pairs(dice: torch.Generator, pairs: int, vocabulary: int) -> list[dict]:
    """Tokenized rows."""
    rows = []
    for _ in range(pairs):
        prompt, row = random_ids(dice, 1, 5, vocabulary), {}
        for kind in ("chosen", "rejected"):
            answer = random_ids(dice, 1, 9, vocabulary)
            row[f"{kind}_input_ids"] = prompt + answer
            row[f"{kind}_labels"] = [-100] * len(prompt) + answer
            row[f"{kind}_attention_mask"] = [1] * len(prompt + answer)
        rows.append(row)
    return rows


def measured(trainer, batch: dict) -> tuple[float, dict]:
    """The loss of a batch and its metrics, without a step."""
    trainer.model.eval()
    with torch.no_grad():
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    return float(loss), metrics


def words(trainer, column: str, row: int = 0) -> list[str]:
    """The tokens of a row, `-` where the label is -100."""
    spell = trainer.processing_class.convert_ids_to_tokens
    return ["-" if i == -100 else spell(i) for i in trainer.train_dataset[row][column]]


def counts(trainer, row=0) -> tuple[int, int]:
    """The number of answer tokens in a tokenized pair."""
    return tuple(
        sum(i != -100 for i in trainer.train_dataset[row][f"{kind}_labels"]) for kind in ("chosen", "rejected")
    )


# --- GRPO and RLOO, which sample groups -----------------------------------------------------------------------------------

SUMS = [
    {"prompt": [{"role": "user", "content": f"{a}+{b}"}], "answer": str(a + b)} for a in range(1, 5) for b in range(4)
]
ANSWERS = [[5, 6, 7, 8, END], [9, 6, END], [10, 11, 12, END], [13, 14, 15, 16, 17, END]]  # other lengths, other tokens
CUT = [[5, 6, END], [5, 7, END], [8] * 8, [9] * 8]  # the last two have no end
CLIP_RATIOS = {f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")}


def first_token(completion_ids, **_) -> list[float]:
    """A reward that differs from answer to answer: small numbers that float32 holds exactly."""
    return [ids[0] / 8 for ids in completion_ids]


def ended(completion_ids, **_) -> list[float]:
    return [float(ids[-1] == END) for ids in completion_ids]


def built(checkpoint, folder, rows=SUMS, model=None, reward=first_token, answers=None, trainer=GRPOTrainer, **more):
    """A trainer; `answers` are what it will sample, over and over. Other keyword arguments are those of `make_trainer`."""
    kind = GRPOConfig if trainer is GRPOTrainer else RLOOConfig
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "num_generations": 4}
    settings = {**sizes, "max_completion_length": 8, "max_steps": 1, **more}
    made = make_trainer(trainer, kind, folder / "run", rows, model=model or checkpoint, reward_funcs=reward, **settings)
    if answers:
        samples(made, answers)
    return made


def samples(trainer, answers: list[list[int]], logps=None) -> list[int]:
    """Makes a trainer sample these answers in turn. Returns a list that fills with the size of each round."""
    rounds = []

    def turn(prompt_ids, *_, **__):
        rounds.append(len(prompt_ids))
        sampled = [list(ids) for ids in itertools.islice(itertools.cycle(answers), len(prompt_ids))]
        return (sampled, logps) if isinstance(trainer, GRPOTrainer) else sampled

    trainer._generate_single_turn = turn
    return rounds


def scored(trainer, rows: int = 1, copies: int = 4) -> dict:
    """A round of `copies` answers to each of the first `rows` prompts."""
    trainer.model.train()
    return trainer._generate_and_score_completions([dict(row) for row in SUMS[:rows] for _ in range(copies)])


def random_batch(seed=0, drift=0.3, rows=6, width=9) -> tuple[dict, torch.Tensor]:
    """A micro-batch as `_prepare_inputs` returns it, and the logits that the model will give for it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = torch.tensor([width, *torch.randint(2, width + 1, (rows - 1,), generator=generator).tolist()])
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = torch.randint(4, VOCABULARY, (rows, width), generator=generator)
    logits = (2 * normal(rows, width + 1, VOCABULARY)).requires_grad_()
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[..., None])[..., 0].detach()
    batch = {
        "prompt_ids": torch.randint(4, VOCABULARY, (rows, 3), generator=generator),
        "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": normal(rows),
        "num_items_in_batch": mask.sum() * 2,
        "old_per_token_logps": logps + drift * normal(rows, width),
        "ref_per_token_logps": logps + 0.5 * normal(rows, width),
    }
    return batch, logits


def trl_loss(trainer, batch, logits, training=False) -> torch.Tensor:
    trainer.model.forward = lambda **_: SimpleNamespace(logits=logits, aux_loss=None)
    trainer.model.train(training)
    return trainer._compute_loss(trainer.model, batch)


# --- Online DPO, XPO and Nash-MD, which compare two answers ---------------------------------------------------------------

QUESTIONS = ("1+2", "7+12", "2+2", "15+15", "3+4", "8+1", "10+10", "6+6")
QUESTION_ROWS = [{"prompt": [{"role": "user", "content": text}], "answer": str(eval(text))} for text in QUESTIONS]


class Says:
    """A model whose logits are given: those of its first call, then those of its second, and so on."""

    def __init__(self, *logits):
        self.logits = iter(logits)

    def train(self):
        return self

    def __call__(self, ids, attention_mask):
        logits = next(self.logits)
        assert ids.shape == logits.shape[:2] == attention_mask.shape
        return SimpleNamespace(logits=logits)


def types_of_products(trainer) -> set:
    """Trains, and gives the types in which the first projections of the policy and of a reference have computed.

    Of the policy only while there was a gradient: what it samples is not meant.
    """
    import torch

    seen, reference = set(), getattr(trainer, "ref_model", None)
    for model in filter(None, (trainer.model, reference)):

        def note(module, arguments, output, model=model):
            if torch.is_grad_enabled() or model is reference:
                seen.add(output.dtype)

        place = next(name for name, _ in model.named_modules() if name.endswith("q_proj"))
        model.get_submodule(place).register_forward_hook(note)
    trainer.train()
    return seen
