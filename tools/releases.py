"""Which class and which argument is in which release of TRL: read from the wheels, kept in reference_guides/releases.json.

    python tools/releases.py read [--add VERSION]   fetch each wheel with pip, read it, write the JSON again
    python tools/releases.py check FILE VERSION     what in the script FILE does not work in that release
    python tools/releases.py move TRAINER OLD NEW   what a script for TRAINER meets on the way from OLD to NEW
    python tools/releases.py find ARGUMENT          which classes have the argument, in which releases, with which default

VERSION may be short: 0.11 is the release of 0.11 that was read. Only `read` needs pip. Nothing of TRL is imported: files
are parsed with `ast`. The functions below "the tables" print Markdown for reference_guides/versions.md.
"""

import argparse
import ast
import importlib.util
import json
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import drift
from tables import NAMES
from trl_source import REPOSITORY, Source, SourceError, newest_version, pinned_version

DATA = REPOSITORY / "reference_guides" / "releases.json"
TRAINERS = {name: module for module, name in NAMES.items()}  # the name of the class without "Trainer" -> of its modules
EARLIER = {"PPOv2": "ppov2"}  # today's PPOTrainer under its first name
REQUIRED = ""  # in place of the default of an argument that has none


# ---------------------------------------------------------------------------------------------------- reading one release


class Release:
    """The classes of one unpacked release: where they can be imported from, their arguments and defaults."""

    def __init__(self, package: Path):
        self.package = package  # the folder `trl`
        self.tree = cache(self._tree)

    def _tree(self, path: Path) -> ast.Module:
        return ast.parse(path.read_text("utf-8"))

    def find(self, path: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
        """The class that a file knows by this name, defined there or imported from another file of TRL."""
        if not path.is_file():
            return None
        for node in ast.walk(self.tree(path)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return path, node
        for node in ast.walk(self.tree(path)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name and (other := self._file(path, node)):
                        return self.find(other, alias.name)
        return None

    def _file(self, path: Path, node: ast.ImportFrom) -> Path | None:
        """The file that a `from ... import` names, if it is one of TRL."""
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            folder = path.parents[node.level - 1]
        elif parts[:1] == ["trl"]:
            folder, parts = self.package, parts[1:]
        else:
            return None
        where = folder.joinpath(*parts)
        return where / "__init__.py" if where.is_dir() else where.with_suffix(".py")

    def bases(self, path: Path, node: ast.ClassDef) -> list[tuple[Path, ast.ClassDef] | str]:
        """The base classes; the name alone where it is not TRL's."""
        names = [ast.unparse(base).split(".")[-1] for base in node.bases]
        return [self.find(path, name) or name for name in names]

    def is_training_arguments(self, path: Path, node: ast.ClassDef) -> bool:
        return any(
            base == "TrainingArguments" if isinstance(base, str) else self.is_training_arguments(*base)
            for base in self.bases(path, node)
        )

    def fields(self, path: Path, node: ast.ClassDef) -> dict[str, str]:
        """Field -> default of a dataclass, those that it inherits from other classes of TRL included."""
        found: dict[str, str] = {}
        for base in reversed(self.bases(path, node)):
            if not isinstance(base, str):
                found |= self.fields(*base)
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            if not item.target.id.startswith("_") and "ClassVar" not in ast.unparse(item.annotation):
                found[item.target.id] = default_of(item.value)
        return found

    def parameters(self, path: Path, node: ast.ClassDef) -> dict[str, str]:
        """Parameter -> default of `__init__`; one that hands everything on has those of its base class as well."""
        init = next((i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"), None)
        inherited: dict[str, str] = {}
        if init is None or (init.args.vararg and init.args.kwarg):
            for base in self.bases(path, node):
                if not isinstance(base, str):
                    inherited = self.parameters(*base) | inherited
        if init is None:
            return inherited
        positional = [*init.args.posonlyargs, *init.args.args][1:]
        defaults = [None] * (len(positional) - len(init.args.defaults)) + init.args.defaults
        own = {argument.arg: default_of(value) for argument, value in zip(positional, defaults, strict=True)}
        own |= {a.arg: default_of(v) for a, v in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)}
        if init.args.kwarg and not inherited:
            own["**" + init.args.kwarg.arg] = REQUIRED
        return inherited | own

    def old_names(self, path: Path, node: ast.ClassDef) -> dict[str, str]:
        """Old name -> new name of the parameters that `__init__` still takes under the old one, by its decorators."""
        found = {}
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                for call in (d for d in item.decorator_list if isinstance(d, ast.Call)):
                    if ast.unparse(call.func) == "deprecate_kwarg":
                        named = {key.arg: key.value for key in call.keywords}
                        new = named.get("new_name") or (call.args[2] if len(call.args) > 2 else None)
                        if new is not None:
                            found[ast.literal_eval(call.args[0])] = ast.literal_eval(new)
        return found

    def exported(self) -> set[str]:
        """Names that `from trl import ...` finds: those of the lazy module, or else those that are imported at once."""
        tree = self.tree(self.package / "__init__.py")
        lazy = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_import_structure"
        ]
        if lazy:
            return {c.value for value in lazy for c in ast.walk(value) if isinstance(c, ast.Constant)}
        return {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}

    def imports(self, name: str, module: str) -> list[str]:
        """The packages from which the class can be imported; a module of `trl.trainer` only where no package has it."""
        found = ["trl"] if name in self.exported() else []
        if self.find(self.package / "experimental" / module / "__init__.py", name):
            found.append(f"trl.experimental.{module}")
        kind = "trainer" if name.endswith("Trainer") else "config"
        inside = self.package / "trainer" / f"{module}_{kind}.py"
        if not found and self.find(inside, name):
            found = [f"trl.trainer.{inside.stem}"]
        return found

    def read(self, name: str, module: str) -> dict:
        """All that is kept about a class; no imports and no arguments where the release has no such class."""
        imports = self.imports(name, module)
        if not imports:
            return {"imports": [], "arguments": {}, "old_names": {}, "training_arguments": False}
        kind = "trainer" if name.endswith("Trainer") else "config"
        places = {
            "trl": self.package / "trainer" / f"{module}_{kind}.py",
            f"trl.experimental.{module}": self.package / "experimental" / module / "__init__.py",
        }
        found = self.find(places.get(imports[0], places["trl"]), name)
        if found is None:
            raise SourceError(f"{name} is exported from {imports[0]} and not defined where it should be")
        arguments = self.parameters(*found) if kind == "trainer" else self.fields(*found)
        return {
            "imports": imports,
            "arguments": arguments,
            "old_names": self.old_names(*found) if kind == "trainer" else {},
            "training_arguments": kind == "config" and self.is_training_arguments(*found),
        }

    def requires(self) -> dict[str, str]:
        """What the wheel says about Python and transformers."""
        info = sorted(self.package.parent.glob("trl-*.dist-info"))[-1]
        text = (info / "METADATA").read_text("utf-8")
        python = re.search(r"^Requires-Python: (.+)$", text, re.M)
        transformers = re.search(r"^Requires-Dist: transformers *\(?([^;)\n]*)", text, re.M)
        return {"python": python[1] if python else "", "transformers": transformers[1].strip() if transformers else ""}


def default_of(value: ast.expr | None) -> str:
    """The default as source text: of `field(default=x)` it is x, of a factory what it makes."""
    if value is None:
        return REQUIRED
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "field":
        named = {key.arg: key.value for key in value.keywords}
        if "default" in named:
            return ast.unparse(named["default"])
        if "default_factory" not in named:
            return REQUIRED
        factory = named["default_factory"]
        return ast.unparse(factory.body) if isinstance(factory, ast.Lambda) else ast.unparse(factory) + "()"
    return ast.unparse(value)


def classes() -> list[tuple[str, str]]:
    """Name and module of each class that is read."""
    return [(name + kind, module) for name, module in (TRAINERS | EARLIER).items() for kind in ("Trainer", "Config")]


def state(source: Source) -> dict[str, dict]:
    """All classes of one release."""
    release = Release(source.package)
    return {name: release.read(name, module) for name, module in classes()}


# --------------------------------------------------------------------------------------------------------- the whole file


def order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def collect(sources: list[Source]) -> dict:
    """The JSON: for each class a history, where an entry [VERSION, VALUE] holds until the next one; null is "not there"."""
    states = {source.version: state(source) for source in sources}
    result: dict = {
        "command": "python tools/releases.py read",
        "releases": {source.version: Release(source.package).requires() for source in sources},
        "of_transformers": [],
        "classes": {},
    }
    for name, _ in classes():
        seen = {version: found[name] for version, found in states.items()}
        keys = ("imports", "training_arguments", "old_names")
        entry = {key: history({v: s[key] for v, s in seen.items()}) for key in keys}
        arguments = dict.fromkeys(argument for s in seen.values() for argument in s["arguments"])
        entry["arguments"] = {
            argument: history({v: s["arguments"].get(argument) for v, s in seen.items()}) for argument in arguments
        }
        result["classes"][name] = entry
    ours = {a for name, c in result["classes"].items() if name.endswith("Config") for a in c["arguments"]}
    ours |= {new for pairs in RENAMED.values() for new in pairs.values()}
    result["of_transformers"] = sorted(ours & training_arguments())
    return result


def training_arguments() -> set[str]:
    """The fields of the installed transformers' TrainingArguments, which a config of TRL has besides its own."""
    folder = Path(next(iter(importlib.util.find_spec("transformers").submodule_search_locations)))
    tree = ast.parse((folder / "training_args.py").read_text("utf-8"))
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments"]
    return {i.target.id for i in found.body if isinstance(i, ast.AnnAssign) and isinstance(i.target, ast.Name)}


def history(values: dict[str, object]) -> list[list]:
    """[version, value] of the first release and of each one that differs from the release before it."""
    found: list[list] = []
    for version, value in values.items():
        if not found or found[-1][1] != value:
            found.append([version, value])
    return found


def written(data: dict) -> str:
    """The JSON as it is committed: a release, and an argument's history, on a line of its own."""
    lines = ["{", f' "command": {json.dumps(data["command"])},', ' "releases": {']
    lines += [f"  {json.dumps(v)}: {json.dumps(r)}," for v, r in data["releases"].items()]
    lines[-1] = lines[-1].rstrip(",")
    lines += [" },", f' "of_transformers": {json.dumps(data["of_transformers"])},', ' "classes": {']
    for name, found in data["classes"].items():
        lines.append(f"  {json.dumps(name)}: {{")
        lines += [f"   {json.dumps(key)}: {json.dumps(found[key])}," for key in found if key != "arguments"]
        lines.append('   "arguments": {')
        lines += [f"    {json.dumps(a)}: {json.dumps(h)}," for a, h in found["arguments"].items()]
        lines[-1] = lines[-1].rstrip(",")
        lines += ["   }", "  },"]
    lines[-1] = "  }"
    return "\n".join([*lines, " }", "}"]) + "\n"


def read(add: str | None) -> None:
    """Writes the JSON again, from the wheels of the releases in it, of the two in pyproject.toml, and of one more.

    A release takes the place of another one of the same minor version.
    """
    wanted = (*load()["releases"], *([add] if add else []), newest_version(), pinned_version())
    versions = {short(version): version for version in wanted}.values()
    DATA.write_text(written(collect([drift.obtain(version) for version in sorted(versions, key=order)])), "utf-8")


@cache
def load() -> dict:
    return json.loads(DATA.read_text("utf-8"))


# -------------------------------------------------------------------------------------------------- questions to the data


def releases() -> list[str]:
    return list(load()["releases"])


def short(version: str) -> str:
    """0.12 for 0.12.2: of each minor release only one was read."""
    return ".".join(version.split(".")[:2])


def known(version: str) -> str:
    """The release that was read for this version: itself, or the one of the same minor release."""
    found = [v for v in releases() if version == v or short(v) == short(version)]
    if not found:
        raise SourceError(f"no release {version} was read; there are {', '.join(releases())}")
    return found[0]


def before(version: str) -> str:
    return releases()[releases().index(version) - 1]


def at(past: list[list], version: str):
    """What a history says about a release."""
    return [value for since, value in past if order(since) <= order(version)][-1]


def where(name: str, version: str) -> list[str]:
    """The packages from which a class can be imported; none if the release has no such class."""
    return at(load()["classes"][name]["imports"], version)


def arguments(name: str, version: str) -> dict[str, str]:
    """Argument -> default as source text of a class in a release, those that transformers adds left out."""
    found = {a: at(past, version) for a, past in load()["classes"][name]["arguments"].items()}
    return {argument: default for argument, default in found.items() if default is not None}


def from_transformers(name: str, argument: str, version: str) -> bool:
    """Whether the config has the argument in any case, because it is one of TrainingArguments."""
    return argument in load()["of_transformers"] and at(load()["classes"][name]["training_arguments"], version)


def takes(name: str, argument: str, version: str) -> bool:
    return argument in arguments(name, version) or from_transformers(name, argument, version)


# What a person has to decide: which new name does the work of an old one. The tests check each pair with the data: the
# release that lost the old name has the new one.
SFT_NAMES = {"max_seq_length": "max_length", "use_liger": "use_liger_kernel"}
ONLINE_NAMES = {
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
}
RENAMED: dict[str, dict[str, str]] = {
    **{f"{t}Trainer": {"tokenizer": "processing_class"} for t in TRAINERS if t not in ("GRPO", "PRM")},
    "SFTConfig": SFT_NAMES,
    "GKDConfig": SFT_NAMES,
    "DPOConfig": {
        "padding_value": "pad_token",
        "use_num_logits_to_keep": "use_logits_to_keep",
        "use_liger_loss": "use_liger_kernel",
        "max_target_length": "max_completion_length",
    },
    "KTOConfig": {"use_liger_loss": "use_liger_kernel"},
    "PPOTrainer": {
        "optimizer": "optimizers",
        "lr_scheduler": "optimizers",
        "tokenizer": "processing_class",
        "dataset": "train_dataset",
        "config": "args",
        "policy": "model",
        "ref_policy": "ref_model",
    },
    "PPOConfig": {"ppo_epochs": "num_ppo_epochs", "init_kl_coef": "kl_coef"},
    "GRPOConfig": {
        "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
        "wandb_log_unique_prompts": "log_unique_prompts",
        "use_liger_loss": "use_liger_kernel",
    },
    "RLOOTrainer": {
        "tokenizer": "processing_class",
        "config": "args",
        "policy": "model",
        "reward_model": "reward_funcs",
    },
    "RLOOConfig": {
        "rloo_k": "num_generations",
        "kl_coef": "beta",
        "cliprange": "epsilon",
        "num_ppo_epochs": "num_iterations",
        "num_mini_batches": "steps_per_generation",
        "response_length": "max_completion_length",
        "total_episodes": "max_steps",
        "normalize_advantage": "normalize_advantages",
        "exp_name": "run_name",
        "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
        "wandb_log_unique_prompts": "log_unique_prompts",
    },
    "OnlineDPOTrainer": {
        "tokenizer": "processing_class",
        "reward_model": "reward_funcs",
        "reward_processing_class": "reward_processing_classes",
    },
    "OnlineDPOConfig": ONLINE_NAMES,
    "NashMDTrainer": {"tokenizer": "processing_class", "reward_model": "reward_funcs"},
    "NashMDConfig": ONLINE_NAMES,
    "XPOTrainer": {"tokenizer": "processing_class", "reward_model": "reward_funcs"},
    "XPOConfig": ONLINE_NAMES,
}
INSTEAD = {  # no new name, and still something to do
    ("DPOConfig", "rpo_alpha"): '`loss_type=["sigmoid", "sft"]` and `loss_weights`',
    ("DPOConfig", "reference_free"): "nothing; `CPOTrainer` needs no reference",
    ("DPOConfig", "tools"): "a column `tools`",
    ("DPOConfig", "ref_model_init_kwargs"): "a `ref_model` that you have loaded yourself",
    ("KTOConfig", "ref_model_init_kwargs"): "a `ref_model` that you have loaded yourself",
    ("BCOConfig", "ref_model_init_kwargs"): "a `ref_model` that you have loaded yourself",
    ("GRPOConfig", "vllm_max_model_len"): "`vllm_max_model_length`, since 0.26",
    ("CPOConfig", "max_target_length"): "`max_completion_length`",
    ("PPOTrainer", "training_data_collator"): "`data_collator`",
    ("PPOTrainer", "model"): "`policy`",
    ("PPOTrainer", "ref_model"): "`ref_policy`",
    ("RLOOConfig", "non_eos_penalty"): "`missing_eos_penalty`, which is a number",
    ("RLOOConfig", "penalty_reward_value"): "`missing_eos_penalty`, which is taken off",
    ("KTOConfig", "loss_type"): '`BCOTrainer` for `"bco"`',
    ("KTOConfig", "prompt_sample_size"): "`BCOConfig`",
    ("KTOConfig", "min_density_ratio"): "`BCOConfig`",
    ("KTOConfig", "max_density_ratio"): "`BCOConfig`",
    ("KTOTrainer", "embedding_func"): "`BCOTrainer`",
    ("KTOTrainer", "embedding_tokenizer"): "`BCOTrainer`",
    ("RLOOTrainer", "ref_policy"): "nothing; the trainer makes the reference",
    ("RLOOConfig", "normalize_reward"): "nothing; TRL handed it to `normalize_advantages`",
    ("RLOOConfig", "missing_eos_penalty"): "a reward function of your own",
    ("OnlineDPOTrainer", "judge"): "`reward_funcs`, which give each answer a number",
    ("NashMDTrainer", "judge"): "`reward_funcs`, which give each answer a number",
    ("XPOTrainer", "judge"): "`reward_funcs`, which give each answer a number",
}
ANEW = {
    "PPOTrainer": "0.12",
    "PPOConfig": "0.12",
    "RLOOTrainer": "0.22",
    "RLOOConfig": "0.22",
}  # another class, same name


def gone(name: str) -> list[tuple[str, str, str]]:
    """(release, argument, what to write instead) for each argument that a release took away while the class stayed."""
    found = []
    for argument, past in load()["classes"][name]["arguments"].items():
        for version, value in past[1:]:
            there = where(name, version) and where(name, before(version))
            if value is None and there and not from_transformers(name, argument, version):
                again = [v for v, later in past if later is not None and order(v) > order(version)]
                text = f"; back in {short(again[0])}" if again and where(name, again[0]) else ""
                if warned := [v for v in releases() if argument in at(load()["classes"][name]["old_names"], v)]:
                    text = f"; up to {short(warned[-1])} the old name is taken with a warning"
                found.append((version, argument, instead(name, argument, version) + text))
    return sorted(found, key=lambda row: order(row[0]))


def instead(name: str, argument: str, version: str) -> str:
    if new := RENAMED.get(name, {}).get(argument):
        return f"`{new}`"
    if (name, argument) in INSTEAD:
        return INSTEAD[name, argument]
    config = name.replace("Trainer", "Config")
    if config != name and where(config, version) and takes(config, argument, version):
        return f"the same in `{config}`"
    return "nothing"


def value_of(default: str) -> object:
    """A default for comparing: 0 and 0.0, 'x' and ['x'], Kind.REVERSE_KL and 'reverse_kl' are the same."""
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return default.split(".")[-1].lower()
    return value[0] if isinstance(value, list) and len(value) == 1 else value


OWN = "that of transformers"  # in place of a default where TRL sets none


def changed_defaults(name: str) -> list[tuple[str, str, str, str]]:
    """(release, argument, default before, default now) wherever a script that does not name the argument meets another."""
    found = []
    for argument, past in load()["classes"][name]["arguments"].items():
        for (_, old), (version, new) in pairwise(past):
            was = OWN if old is None and from_transformers(name, argument, before(version)) else old
            now = OWN if new is None and from_transformers(name, argument, version) else new
            if was is None or now is None or not where(name, version) or not where(name, before(version)):
                continue
            if OWN not in (was, now) and value_of(was) == value_of(now):
                continue
            found.append((version, argument, was, now))
    return found


def check(text: str, version: str) -> list[tuple[int, str]]:
    """(line, what is wrong) in a script: imports of the trainers and arguments that a release does not know."""
    version, found, classes_there = known(version), [], load()["classes"]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl":
            for name in (alias.name for alias in node.names if alias.name in classes_there):
                there, own = where(name, version), f"trl.experimental.{dict(classes())[name]}"
                inside = [place for place in there if (node.module + ".").startswith(place + ".")]
                if not inside or (inside == ["trl"] and (node.module + ".").startswith(own + ".")):
                    found.append((node.lineno, missing(name, there, version)))
        if not isinstance(node, ast.Call) or (name := ast.unparse(node.func).split(".")[-1]) not in classes_there:
            continue
        for key in (k for k in node.keywords if k.arg and where(name, version)):
            past = classes_there[name]["arguments"].get(key.arg)
            if takes(name, key.arg, version) or (past is None and name.endswith("Config")):
                continue  # an argument that TRL never had may be one of transformers
            found.append((key.value.lineno, f"`{key.arg}` of {name}: " + advice(name, key.arg, version)))
    return sorted(found)


def missing(name: str, there: list[str], version: str) -> str:
    if there:
        return f"{name}: `from {there[0]} import {name}`"
    last = [v for v in releases() if where(name, v)]
    when = "came later" if order(last[0]) > order(version) else f"was there until {short(last[-1])}"
    return f"{name}: not in {short(version)}, it {when}"


def advice(name: str, argument: str, version: str) -> str:
    past = load()["classes"][name]["arguments"].get(argument)
    if past is None:
        return "in no release that was read"
    accepted = at(load()["classes"][name]["old_names"], version)
    lost = [(v, text) for v, a, text in gone(name) if a == argument and order(v) <= order(version)]
    if argument in accepted:
        return f"still taken, with a warning; write `{accepted[argument]}`"
    if lost:
        return f"gone in {short(lost[-1][0])}; instead: {lost[-1][1]}" + further(name, argument, version)
    first = next(v for v, value in past if value is not None)
    return f"not yet there, it came in {short(first)}"


def further(name: str, argument: str, version: str) -> str:
    """What happened since to the argument that is named instead: it may be gone, too."""
    config, new = name.replace("Trainer", "Config"), RENAMED.get(name, {}).get(argument)
    if new and not takes(name, new, version):
        return f"; and then `{new}`: {advice(name, new, version)}"
    if not new and config != name and argument in load()["classes"][config]["arguments"]:
        return "" if takes(config, argument, version) else f"; and there: {advice(config, argument, version)}"
    return ""


def move(trainer: str, old: str, new: str) -> list[str]:
    """Lines of Markdown: what a script for a trainer meets between two releases, the older one first."""
    old, new = known(old), known(new)
    if trainer not in TRAINERS or order(old) >= order(new):
        raise SourceError(f"say one of {', '.join(TRAINERS)}, then the older and the newer release")
    lines = []
    for name in (f"{trainer}Trainer", f"{trainer}Config"):
        places = [where(name, version) for version in (old, new)]
        if not places[1]:
            return [f"- {missing(name, [], new)}"]
        if not places[0]:
            lines.append(f"- `{name}` is new: `from {places[1][0]} import {name}`")
        elif places[0][0] != places[1][0]:
            lines.append(f"- `from {places[0][0]} import {name}` is now `from {places[1][0]} import {name}`")
        way = [v for v in releases() if order(old) < order(v) <= order(new)]
        if name in ANEW and known(ANEW[name]) in way:
            lines.append(f"- `{name}` was written anew in {ANEW[name]}: start from a new script")
        rows: dict[tuple[str, str], list[str]] = {}
        for version, argument, text in gone(name):
            if version in way and argument in arguments(name, old) and not takes(name, argument, new):
                rows.setdefault((version, text + further(name, argument, new)), []).append(f"`{argument}`")
        for (version, text), found in rows.items():
            lines.append(f"- `{name}` lost {', '.join(found)} in {short(version)}; instead: {text}")
        if name.endswith("Config"):
            lines += [
                f"- default of `{a}`: {shown(was)} became {shown(now)}" for a, was, now in between(name, old, new)
            ]
    return lines


def between(name: str, old: str, new: str) -> list[tuple[str, str, str]]:
    """(argument, default in the old release, default in the new one) where both have the argument and they differ."""
    found = []
    noticed = {
        argument
        for version, argument, *_ in changed_defaults(name)
        if order(old) < order(version) <= order(new) and (argument, short(version)) not in WITHOUT_EFFECT
    }
    for argument in (a for a in load()["classes"][name]["arguments"] if a in noticed):
        was, now = (
            arguments(name, v).get(argument, OWN if from_transformers(name, argument, v) else None) for v in (old, new)
        )
        if None not in (was, now) and value_of(was) != value_of(now):
            found.append((argument, was, now))
    return found


def find(argument: str) -> list[str]:
    """A line for each class that has or had the argument: since when with which default, and when it went."""
    lines = []
    for name, found in load()["classes"].items():
        parts = []
        for number, (version, default) in enumerate(found["arguments"].get(argument, [])):
            if default is not None:
                parts.append(f"{short(version)} {shown(default) if default != REQUIRED else 'required'}")
            elif number:
                stays = from_transformers(name, argument, version)
                parts.append(f"{short(version)} {OWN if stays else 'gone'}")
        if parts:
            lines.append(f"{name}: {', '.join(parts)}")
    return lines


def shown(default: str) -> str:
    return default if default == OWN else f"`{default}`"


# --------------------------------------------------------------------------------------------------------------- the tables


def counted() -> None:
    """One sentence: how many releases were read, and which."""
    read_them = releases()
    print(f"\n{len(read_them)} releases: {', '.join(read_them)}.\n")


def trainers() -> None:
    """Which trainer is in which release, and its import in the pinned and in the newest one."""
    pinned, newest = pinned_version(), newest_version()
    print("\n| trainer | first | `from trl` until | `trl.experimental` since | gone in | ", end="")
    print(f"import in {pinned} | import in {newest} |\n| --- | --- | --- | --- | --- | --- | --- |")
    for trainer in TRAINERS:
        print("| " + " | ".join([f"[{trainer}](../annotated_trainers/{TRAINERS[trainer]}.md)", *row(trainer)]) + " |")
    print()


def row(trainer: str) -> list[str]:
    name, every = f"{trainer}Trainer", releases()
    there = [v for v in every if where(name, v)]
    top = [v for v in every if "trl" in where(name, v)]
    experimental = [v for v in every if any("experimental" in place for place in where(name, v))]
    first = ("0.8 or before" if there[0] == every[0] else short(there[0])) + (
        f" (`from trl` since {short(top[0])})" if top[0] != there[0] else ""
    )
    until = "still" if top[-1] == every[-1] else short(top[-1])
    after = every[every.index(there[-1]) + 1 :]
    gone_in = short(after[0]) if after else "-"
    imports = [f"`{places[0]}`" if (places := where(name, v)) else "-" for v in (pinned_version(), newest_version())]
    return [first, until, short(experimental[0]) if experimental else "-", gone_in, *imports]


def requirements() -> None:
    """What the releases ask for, a row wherever that changes."""
    print("\n| from release | Python | transformers |\n| --- | --- | --- |")
    last = None
    for version, asked in load()["releases"].items():
        if asked != last:
            print(f"| {short(version)} | `{asked['python']}` | `{asked['transformers']}` |")
        last = asked
    print()


def removed(trainer: str) -> None:
    """The arguments of a trainer and its config that are gone, by release and by what takes their place."""
    print("\n| gone in | of | arguments | instead |\n| --- | --- | --- | --- |")
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name in (f"{trainer}Trainer", f"{trainer}Config"):
        for version, argument, text in gone(name):
            rows.setdefault((version, name, text), []).append(argument)
    for (version, name, text), found in sorted(rows.items(), key=lambda item: order(item[0][0])):
        print(f"| {short(version)} | `{name}` | {', '.join(f'`{a}`' for a in found)} | {text} |")
    print()


def added(trainer: str) -> None:
    """The arguments that came to a trainer and its config after their first release, folded away."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name in (f"{trainer}Trainer", f"{trainer}Config"):
        for argument, past in load()["classes"][name]["arguments"].items():
            for (_, old), (version, new) in pairwise(past):
                known_before = where(name, before(version)) and not from_transformers(name, argument, before(version))
                if old is None and new is not None and known_before:
                    rows.setdefault((version, name), []).append(argument)
    if not rows:
        return
    print('\n<details markdown="1">\n<summary>Arguments that came later</summary>\n')
    print("| came in | to | arguments |\n| --- | --- | --- |")
    for (version, name), found in sorted(rows.items(), key=lambda item: order(item[0][0])):
        print(f"| {short(version)} | `{name}` | {', '.join(f'`{argument}`' for argument in found)} |")
    print("\n</details>\n")


def tokenizers() -> None:
    """From which release on each trainer takes `processing_class`, and until when it took `tokenizer`, with a warning."""
    groups: dict[tuple[str, str], list[str]] = {}
    for trainer in TRAINERS:
        past = load()["classes"][f"{trainer}Trainer"]
        new = [v for v in releases() if "processing_class" in arguments(f"{trainer}Trainer", v)]
        old = [v for v in releases() if "tokenizer" in {*arguments(f"{trainer}Trainer", v), *at(past["old_names"], v)}]
        groups.setdefault((short(old[-1]) if old else "never", short(new[0])), []).append(trainer)
    print("\n| `tokenizer` works until | `processing_class` since | trainers |\n| --- | --- | --- |")
    for (last, first), found in sorted(groups.items(), key=lambda item: order(item[0][0]) or [99]):
        print(f"| {last} | {first} | {', '.join(found)} |")
    print()


def lengths() -> None:
    """When `max_prompt_length` left each config, and the default of `max_length` in the pinned and the newest release."""
    print(f"\n| config | `max_prompt_length` until | `max_length` in {pinned_version()} | in {newest_version()} |")
    print("| --- | --- | --- | --- |")
    for name in (f"{trainer}Config" for trainer in TRAINERS):
        had = [v for v in releases() if "max_prompt_length" in arguments(name, v)]
        now = [arguments(name, v).get("max_length") for v in (pinned_version(), newest_version())]
        cells = [f"`{value}`" if value else "-" for value in now]
        print(f"| `{name}` | {short(had[-1]) if had else 'never there'} | {' | '.join(cells)} |")
    print()


MARKED = "deprecated: the new default tells who still sets it"
TYPED = "written out as transformers has it"
WITHOUT_EFFECT = {  # (argument, release) -> why a training run does not notice the other default
    ("query_dataset", "0.11"): "another address of the same data set",
    ("dataset_text_field", "0.12"): "the name of a column",
    ("neftune_noise_alpha", "0.12"): "transformers has the same",
    ("push_to_hub", "0.12"): "what is uploaded",
    ("remove_unused_columns", "0.12"): "which columns are kept, and the trainer kept these before",
    ("exp_name", "0.14"): "the name of a run",
    ("dataset_batch_size", "0.15"): MARKED,
    ("num_of_sequences", "0.15"): MARKED,
    ("chars_per_token", "0.15"): MARKED,
    ("max_seq_length", "0.16"): "deprecated: `max_length` came with the same 1024",
    ("use_liger", "0.16"): MARKED,
    ("use_num_logits_to_keep", "0.16"): MARKED,
    ("vllm_device", "0.16"): MARKED,
    ("vllm_dtype", "0.16"): MARKED,
    ("vllm_gpu_memory_utilization", "0.16"): "how much memory vLLM takes",
    ("vllm_server_timeout", "0.17"): "how long a server is waited for",
    ("vllm_gpu_memory_utilization", "0.18"): "how much memory vLLM takes",
    ("scale_rewards", "0.22"): "another spelling of the same",
    ("gpu_memory_utilization", "0.23"): MARKED,
    ("remove_unused_columns", "0.24"): "which columns are kept",
    ("use_liger_loss", "0.25"): MARKED,
    ("lr_scheduler_kwargs", "0.25"): TYPED,
    ("lr_scheduler_kwargs", "0.26"): TYPED,
    ("wandb_log_unique_prompts", "0.26"): MARKED,
    ("top_k", "0.27"): "another spelling of no limit",
    ("base_model_attribute_name", "0.28"): MARKED,
    ("force_use_ref_model", "0.28"): MARKED,
    ("generate_during_eval", "0.28"): MARKED,
    ("label_pad_token_id", "0.28"): MARKED,
    ("max_completion_length", "0.28"): MARKED,
    ("max_prompt_length", "0.28"): MARKED,
    ("reference_free", "0.28"): MARKED,
    ("run_name", "0.28"): "the name of a run",
    ("use_logits_to_keep", "0.28"): MARKED,
    ("lr_scheduler_kwargs", "0.29"): TYPED,
    ("torch_empty_cache_steps", "0.29"): TYPED,
    ("use_liger_kernel", "0.29"): TYPED,
    ("remove_unused_columns", "1.0"): "which columns are kept, and the trainer kept them before",
    ("train_sampling_strategy", "1.6"): "the trainer kept the order of the rows before, too",
    ("vllm_importance_sampling_cap", "1.6"): "a new name, `vllm_importance_sampling_clip_max`, has the value",
    ("pad_to_multiple_of", "1.16"): "`auto` pads on Neuron devices only",
}

EFFECT = {  # (argument, release) -> what a run notices; for a learning rate it is computed
    ("max_new_tokens", "0.11"): "longer answers",
    ("max_length", "0.14"): "in 0.13 `None` cut nothing in DPO and PRM, and meant 512 in the others",
    ("max_prompt_length", "0.14"): "in 0.13 `None` cut nothing in DPO, and meant 128 in the others",
    ("max_seq_length", "0.15"): "little: `None` meant 1024 too, or less if the tokenizer says so",
    ("gradient_accumulation_steps", "0.15"): "8 became 1",
    ("per_device_train_batch_size", "0.15"): "1 became 8, and it counts answers, no longer prompts",
    ("ref_model_mixup_alpha", "0.16"): "with `sync_ref_model` only",
    ("ref_model_sync_steps", "0.16"): "with `sync_ref_model` only",
    ("temperature", "0.18"): "more varied answers",
    ("top_k", "0.18"): "answers are sampled from all tokens, no longer from the 50 likeliest",
    (
        "average_tokens_across_devices",
        "0.19",
    ): "on several devices only: the loss is divided by the tokens of all of them",
    ("average_tokens_across_devices", "0.23"): "as your transformers has it",
    ("beta", "0.19"): "no distance to a reference any more, and no reference in memory",
    ("bf16", "0.19"): "bfloat16 is on unless `fp16` is; an error where the hardware has none",
    ("logging_steps", "0.19"): "a line of log for 10 steps, no longer for 500",
    ("packing_strategy", "0.20"): "other rows are packed together",
    ("gradient_checkpointing", "0.22"): "less memory, slower steps, the same numbers",
    ("loss_type", "0.22"): "the loss is divided by another number of tokens",
    ("max_prompt_length", "0.26"): "prompts are cut no more",
    ("vllm_importance_sampling_cap", "0.26"): "with `use_vllm` only: another limit of the weights that correct for it",
    ("max_prompt_length", "0.27"): "prompts are cut no more",
    ("f_alpha_divergence_coef", "0.29"): 'with `f_divergence_type="alpha_divergence"` only',
    ("truncation_mode", "0.29"): "a row that is too long loses its end and no longer its beginning",
    ("vllm_mode", "1.0"): "with `use_vllm` only: vLLM shares the GPU with the training",
    ("loss_type", "1.6"): "1.6 fills in `nll`, 1.7 to 1.14 `chunked_nll`: the same loss, in less memory",
    ("max_completion_length", "1.10"): "fewer answers are cut; more memory and time",
    ("use_bias_correction_kl", "1.10"): "another gradient of the distance, where `beta` is not 0",
    ("router_aux_loss_coef", "1.14"): "mixture-of-experts models only: the weight is that of the model's config",
    ("loss_type", "1.15"): "the same loss",
}
LEARNING_RATE = 5e-05  # transformers' own


def effect(argument: str, version: str, was: str, now: str) -> str:
    if argument != "learning_rate":
        return EFFECT[argument, short(version)]
    ratio = float(now) / (LEARNING_RATE if was == OWN else float(was))
    return f"{ratio:.3g} times higher" if ratio > 1 else f"{1 / ratio:.3g} times lower"


def defaults() -> None:
    """The defaults that changed and that a training run notices, the same change of several configs in one row."""
    print("\n| in | argument | before | now | configs | what a run notices |\n| --- | --- | --- | --- | --- | --- |")
    for (version, argument, was, now), names in effects().items():
        who = "all fifteen" if len(names) == len(TRAINERS) else ", ".join(names)
        cells = [short(version), f"`{argument}`", shown(was), shown(now), who, effect(argument, version, was, now)]
        print("| " + " | ".join(cells) + " |")
    print()


def effects() -> dict[tuple[str, str, str, str], list[str]]:
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for trainer in TRAINERS:
        name = f"{trainer}Config"
        for version, argument, was, now in changed_defaults(name):
            if (argument, short(version)) not in WITHOUT_EFFECT and ANEW.get(name) != short(version):
                rows.setdefault((version, argument, was, now), []).append(trainer)
    return dict(sorted(rows.items(), key=lambda item: (order(item[0][0]), item[0][1])))


OLD_SCRIPT = """from trl import CPOConfig, CPOTrainer, SFTConfig, SFTTrainer

sft_args = SFTConfig(output_dir="sft", dataset_text_field="text", max_seq_length=512)
SFTTrainer(model="Qwen/Qwen2-0.5B", args=sft_args, tokenizer=tokenizer, packing=True, train_dataset=texts).train()

cpo_args = CPOConfig(output_dir="cpo", max_length=512, max_prompt_length=256)
CPOTrainer(model="sft", args=cpo_args, tokenizer=tokenizer, train_dataset=pairs).train()
"""
NEW_SCRIPT = """from trl import SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

sft_args = SFTConfig(output_dir="sft", dataset_text_field="text", max_length=512, packing=True)
SFTTrainer(model="Qwen/Qwen2-0.5B", args=sft_args, processing_class=tokenizer, train_dataset=texts).train()

cpo_args = CPOConfig(output_dir="cpo", max_length=512)
CPOTrainer(model="sft", args=cpo_args, processing_class=tokenizer, train_dataset=pairs).train()
"""


def example() -> None:
    """An old script, what `check` says of it with the pinned release, and the same script as it has to be."""
    said = [f"old.py:{line}: {message}" for line, message in check(OLD_SCRIPT, pinned_version())]
    fence("python", OLD_SCRIPT, "a script for TRL 0.9, which the pinned release refuses; the tests give it to the tool")
    print(f"`python tools/releases.py check old.py {pinned_version()}` prints")
    fence("text", "\n".join(said) + "\n", "printed into this page by tools/releases.py")
    print(f"and of this one it prints nothing, with {pinned_version()} as with {newest_version()}:")
    fence("python", NEW_SCRIPT, "the same script again, for a model that is not in this repository")


def moves(trainer: str, old: str) -> None:
    """The command `move` with what it prints, up to the pinned release."""
    print(f"\n`python tools/releases.py move {trainer} {old} {pinned_version()}` prints\n")
    print("\n".join(move(trainer, old, pinned_version())) + "\n")


def fence(language: str, text: str, why: str) -> None:
    print(f"\n<!-- not run: {why} -->\n```{language}\n{text}```\n")


def installing() -> None:
    """The commands that put two releases side by side."""
    old = known("0.9")
    text = f"""python3 -m venv old && old/bin/pip install "trl=={old}" "transformers==VERSION"
python3 -m venv new && new/bin/pip install "trl=={pinned_version()}"
old/bin/python script.py
new/bin/python script.py
"""
    fence("bash", text, "it installs two releases from a package index")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("read", help="fetch the wheels and write the JSON again")
    command.add_argument("--add", metavar="VERSION", help="one more release")
    command = commands.add_parser("check", help="what in a script does not work in a release; exit 1 if anything")
    command.add_argument("file", type=Path)
    command.add_argument("version")
    command = commands.add_parser("move", help="what changes for a trainer between two releases")
    command.add_argument("trainer", help=", ".join(TRAINERS))
    command.add_argument("old")
    command.add_argument("new")
    command = commands.add_parser("find", help="which classes have an argument, and since when")
    command.add_argument("argument")
    args = parser.parse_args(argv)
    try:
        if args.command == "read":
            read(args.add)
        elif args.command == "find":
            print("\n".join(find(args.argument)) or f"no class here ever had an argument {args.argument}")
        elif args.command == "move":
            print("\n".join(move(args.trainer, args.old, args.new)) or "nothing that was read from the classes")
        else:
            try:
                found = check(args.file.read_text("utf-8"), args.version)
            except SyntaxError as error:
                raise SourceError(f"{args.file.name} cannot be read as Python: {error}") from None
            for line, message in found:
                print(f"{args.file.name}:{line}: {message}")
            return int(bool(found))
    except (SourceError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
