"""The card of a shared result: README.md with a front matter, as the Hugging Face Hub shows it."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from ..files.lines import one_line

PICTURE = "samples.png"
UNKNOWN = "unknown"  # the Hub's word for a licence that nobody has stated
# Marks of Markdown and HTML anywhere, those of a list or rule at the start, and what makes an address a link.
_SPECIAL = re.compile(r"[\\`*_{}\[\]()<>#|~&$]|^[-+=]|:(?=//)|(?<=www)\.")
_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass
class Base:
    """A network that a result was made from.

    file: the name of its file, "" of a module. kind: its class. fingerprint: of its parameters, 64 hex digits, or "".
    folder: what of the result belongs to it, "" where it is the only one. share: (p, interval or None) of several.
    """

    file: str
    kind: str
    fingerprint: str
    folder: str = ""
    share: tuple[float, list[float] | None] | None = None


@dataclass
class Facts:
    """What a card tells.

    repo: USER/NAME. content: "network", "delta", or "miner" alone, of a result whose generator is the source's.
    trained: how many numbers the delta has, in those of the network. which, step: the result and its snapshot.
    metrics, intervals: {name: value}, {name: [low, high]}; judged: on what they are measured, a sentence.
    warnings: sentences. settings: the run's, without paths. licence: an identifier of the Hub's. origin: where the
    base is to be had, in the words of whoever shares. versions: {name: version}.
    """

    repo: str
    content: str
    which: str
    step: int
    bases: list[Base]
    trained: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    judged: str = ""
    warnings: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    licence: str = UNKNOWN
    origin: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    families: list[str] = field(default_factory=list)
    picture: bool = False
    resize: int | None = None


def text(value: object) -> str:
    """As it reads, on one line, whatever Markdown or HTML it looks like."""
    return _SPECIAL.sub(lambda found: _HTML.get(found[0], "\\" + found[0]), one_line(str(value)))


def card(facts: Facts) -> str:
    """The card, in Markdown."""
    parts = [_front(facts), f"# {text(facts.repo.partition('/')[2])}\n", _summary(facts)]
    if facts.picture:
        parts.append(f"![images that it makes]({PICTURE})\n")
    parts += [_use(facts), _bases(facts), _metrics(facts)]
    if facts.warnings:
        parts.append("## Warnings\n\n" + "".join(f"- {text(warning)}\n" for warning in facts.warnings))
    parts += [_settings(facts), _licence(facts)]
    return "\n".join(parts)


def _front(facts: Facts) -> str:
    """YAML of JSON's strings, which it takes as they are."""
    tags = ["gan", "minegan", *facts.families, facts.content]
    lines = {"license": facts.licence, "library_name": "minegan_fast", "pipeline_tag": "unconditional-image-generation"}
    shown = [f"{name}: {json.dumps(value)}" for name, value in lines.items()]
    if _REPO.fullmatch(facts.origin):
        relation = "finetune" if facts.content == "network" else "adapter"
        shown += [f"base_model: {json.dumps(facts.origin)}", f"base_model_relation: {json.dumps(relation)}"]
    shown += ["tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags))]
    return "\n".join(["---", *shown, "---", ""])


def _summary(facts: Facts) -> str:
    several = len(facts.bases) > 1
    part = "" if facts.trained is None else f", {100 * facts.trained:.1f} % of the network's numbers"
    one = {
        "network": "the adapted network, which needs no base",
        "delta": f"a delta: the rows of the generator that trained{part}, to be put onto its base",
        "miner": "a miner alone, which goes before the source's own generator",
    }
    many = {
        "network": "the adapted networks, which need no base",
        "delta": f"deltas: of each generator the rows that trained{part}, to be put onto its base",
        "miner": "miners alone, which go before the sources' own generators",
    }
    what = (many if several else one)[facts.content]
    state = {"best": "its best snapshot", "last": "its last snapshot", "mined": "after mining alone"}
    begun = f"{len(facts.bases)} pretrained GANs" if several else "A pretrained GAN"
    return (
        f"{begun}, adapted to a few images by minegan_fast. This is {what}; of the run {state[facts.which]}, step "
        f"{facts.step}. The methods are MineGAN ([arXiv 1912.05270](https://arxiv.org/abs/1912.05270)) and MineGAN++ "
        "([arXiv 2104.13742](https://arxiv.org/abs/2104.13742)).\n"
    )


def _use(facts: Facts) -> str:
    lines = ["import minegan_fast as mf", ""]
    if len(facts.bases) == 1:
        lines += _loading(facts, facts.bases[0], "G")
        lines.append(f'images = mf.load_mined("hf://{facts.repo}", G).sample(16)  # [16, C, H, W] in [-1, 1]')
    else:
        names = [base.folder for base in facts.bases]
        mined = []
        for number, base in enumerate(facts.bases):
            lines += _loading(facts, base, f"G{number}")
            mined.append(f"mf.load_mined({json.dumps(f'hf://{facts.repo}/{base.folder}')}, G{number})")
        lines += ["mined = [", *(f"    {one}," for one in mined), "]"]
        choice = "" if facts.resize is None else f", resize={facts.resize}"
        lines.append(f"G = mf.MultiGenerator([m.generator for m in mined], mined, names={json.dumps(names)}{choice})")
        shares = [base.share[0] if base.share else 1 / len(names) for base in facts.bases]
        lines.append(f"G.take(torch.tensor({json.dumps(shares)}, dtype=torch.float64))")
        lines.append("images = G.eval().sample(16)")
        lines.insert(0, "import torch")
    code = "\n".join(lines)
    return f"## Use\n\n```sh\npip install 'minegan_fast[hub]'\n```\n\n```python\n{code}\n```\n"


def _loading(facts: Facts, base: Base, name: str) -> list[str]:
    at = f"hf://{facts.repo}/{base.folder}".rstrip("/")
    if facts.content == "network":
        if base.file:
            return [f"{name} = mf.load_generator({json.dumps(at)})"]
        words = f"the network {_word(base.kind)}, with the weights of generator.safetensors"
        return [f"{name} = ...  # {words}"]
    if base.file:
        lines = [f"{name} = mf.load_generator({json.dumps(base.file)})  # the base below"]
    else:
        lines = [f"{name} = ...  # the network {_word(base.kind)}, with the weights of the base below"]
    return lines + [f"mf.load_delta({name}, {json.dumps(at)})"] * (facts.content == "delta")


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _bases(facts: Facts) -> str:
    columns = ["file", "class", "fingerprint"]
    several = len(facts.bases) > 1
    rows = []
    for base in facts.bases:
        row = [text(base.file) or "a module", text(base.kind), f"`{_word(base.fingerprint)}`"]
        if several and base.share:
            p, interval = base.share
            ends = f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})" if interval else ""
            row.append(f"{100 * p:.0f} %{ends}")
        rows.append(row)
    if several and all(base.share for base in facts.bases):
        columns.append("share of the images")
    needed = {
        "network": "Nothing of it is needed to use this one.",
        "delta": "`load_delta` refuses any other, and says that it wants this one.",
        "miner": "The miner is of use before this network alone.",
    }[facts.content]
    said = f" It is to be had at {_address(facts.origin)}." if facts.origin else ""
    if not facts.origin and facts.content != "network":
        said = " Whoever shared this did not say where it is to be had."
    return f"## Base\n\n{_table(columns, rows)}\n{needed}{said}\n"


def _address(origin: str) -> str:
    """A link where it is an address or a repository."""
    if re.fullmatch(r"https?://[^\s<>]+", origin):
        return f"<{origin}>"
    return f"[{text(origin)}](https://huggingface.co/{origin})" if _REPO.fullmatch(origin) else text(origin)


def _metrics(facts: Facts) -> str:
    if not facts.metrics:
        return "## Metrics\n\nNone were measured.\n"
    rows = []
    for name, value in facts.metrics.items():
        ends = facts.intervals.get(name)
        rows.append([text(name), f"{value:.4g}", f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else ""])
    columns = ["", "value", "95 % interval"]
    if not facts.intervals:
        columns, rows = columns[:2], [row[:2] for row in rows]
    return f"## Metrics\n\n{_table(columns, rows)}\n{facts.judged}\n"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _settings(facts: Facts) -> str:
    versions = ", ".join(f"{text(name)} {text(version)}" for name, version in facts.versions.items())
    shown = json.dumps(facts.settings, indent=2)  # escapes line breaks, so nothing in it ends the block
    return (
        f"## Settings\n\nShared with {versions}.\n\n<details><summary>All settings of the run</summary>\n\n"
        f"```json\n{shown}\n```\n\n</details>\n"
    )


def _licence(facts: Facts) -> str:
    stated = "None was stated." if facts.licence == UNKNOWN else f"{text(facts.licence)}, as whoever shared this says."
    return (
        f"## Licence\n\n{stated} It is made from the network above and from images, whose own licences go on to "
        "apply.\n"
    )
