"""The model card of an export: README.md as the Hugging Face Hub shows it, filled in from the run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from cvae.use import Model
from pipeline.rundir import record
from pipeline.rundir.headline import HEADLINES, standing_for
from pipeline.rundir.record import Evaluation

CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
PICTURE = "samples.png"

CELEBA = f"""\
The training images are [CelebA]({CELEBA_PAGE}): photos of celebrities from the internet.

- **Licence.** CelebA may be used for non-commercial research only. Its owners do not hold the rights to
  the photos, and they forbid to sell or trade any part of the images or of data derived from them. Treat
  these weights in the same way.
- **Consent.** Nobody in the photos was asked. Do not use the model to imitate a real person.
- **Bias.** Celebrities are not a sample of people: most are young, light-skinned and made up for a camera.
  The labels are judgements of strangers. `Male` knows two values, and `Attractive` says more about
  who labelled than about who was labelled. The model repeats all this, also in attributes that you do
  not name.
"""
TOY = """\
The training images are drawings that the project makes itself, with CelebA's attribute names. They show
nobody, and their licence is that of the project (MIT). The model draws such drawings, and no photos.
"""
OTHER = """\
The training images are the owner's. Ask for their licence before you pass this model on: these weights
are derived from them.
"""
LICENCES: dict[str, tuple[str, str, str]] = {  # data set -> licence, its name, its page
    "celeba": ("other", "celeba-non-commercial-research", CELEBA_PAGE),
    "toy": ("mit", "", ""),
}
PEOPLE = {"celeba": CELEBA, "toy": TOY}
GITATTRIBUTES = "".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in ("safetensors", "onnx", "pt2")
)

_SEAL = "\n<!-- An export replaces this file unless the text above was changed; its sha256: "


def model_card(run_dir: Path, model: Model, files: dict[Path, float]) -> str:
    """Return the text of README.md; `files` are programs beside it and their differences to the model."""
    source = str(model.card.provenance["data"])
    found = record.headline(record.evaluations(run_dir))
    parts = [
        _front_matter(source),
        f"# {run_dir.absolute().name}\n",
        _what(model),
        _use(model),
        "## Files\n\n" + _files(files),
        "## Training data\n\n" + PEOPLE.get(source, OTHER),
        _data(model),
        "## Training\n\n" + _training(model),
        "## Numbers\n\n" + _numbers(found, model),
        "## Limits\n\n" + _limits(model),
    ]
    return "\n".join(parts)


def sealed(text: str) -> str:
    """Return a generated card with a digest of its text, so that `is_generated` sees a change by hand."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}{_SEAL}{digest} -->\n"


def is_generated(card: str) -> bool:
    """Return whether nobody has changed a card since it was generated."""
    text, seal, _ = card.rpartition(_SEAL)
    return bool(seal) and sealed(text) == card


def _front_matter(source: str) -> str:
    licence, name, page = LICENCES.get(source, ("other", "licence-of-the-training-images", ""))
    tree: dict[str, Any] = {"license": licence}
    if name:
        tree["license_name"] = name
    if page:
        tree["license_link"] = page
    tree["library_name"] = "cvae"
    tree["pipeline_tag"] = "unconditional-image-generation"
    tree["tags"] = ["variational-autoencoder", "conditional", "faces", "attributes", "arxiv:2511.08946"]
    return f"---\n{yaml.safe_dump(tree, sort_keys=False)}---\n"


def _what(model: Model) -> str:
    settings = model.card.model
    return (
        f"A conditional variational autoencoder for faces of {model.size} x {model.size} pixels with"
        f" {len(model.attributes)} binary attributes.\n"
        f"Its decoder variance is `{settings.variance.name}`, its prior p(z|y) is `{settings.prior.name}`,"
        f" and z has {settings.z_dim} dimensions.\n\n"
        f"![Samples of this model with attributes of training images]({PICTURE})\n"
    )


def _use(model: Model) -> str:
    name = model.attributes[0]
    return f"""\
## Use

The library `cvae` needs torch and safetensors only.

```python
import cvae

model = cvae.load(".")  # this folder
faces = model.sample({{"{name}": 1}}, n=16, seed=0)  # uint8 [16, {model.size}, {model.size}, 3]
```

Attributes that you do not name come from training images that carry the named ones.

It draws pictures, and it changes attributes of pictures, for research on such models. It is no judge of
people: do not use it to recognise or rate anybody.
"""


def _files(files: dict[Path, float]) -> str:
    lines = [
        "| file | content |",
        "|---|---|",
        "| `model.safetensors` | the weights, float32 |",
        "| `model.json` | configuration, attributes, label rows of training images, origin, digests |",
    ]
    for file, error in files.items():
        name = "/".join(file.parts[-2:])
        lines.append(f"| `{name}` | {_program(file)}; differs from the live model by at most {error:.0e} |")
    return "\n".join(lines) + "\n"


def _program(file: Path) -> str:
    """Return the inputs and the output of a program, for people."""
    if file.stem == "decoder":
        return "`attributes` [n, A] and `z` [n, D] to images [n, 3, S, S] in [-1, 1]"
    return "`attributes` [n, A] and standard normal `noise` [n, D] to `z` [n, D]"


def _data(model: Model) -> str:
    """Return the share of each attribute in the stored label rows."""
    card = model.card
    shares = card.rows.float().mean(0)
    images = f"{card.provenance['train_images']:,} training images"
    square = f"centred square of {card.crop} pixels" if card.crop else "largest centred square"
    lines = [
        f"{images}; the {square}, resized to {card.size}.",
        f"Shares of attributes in {len(card.rows):,} of them:",
        "",
        "| attribute | share |",
        "|---|---:|",
    ]
    for position in shares.argsort(descending=True).tolist():
        lines.append(f"| {card.attributes[position]} | {100 * float(shares[position]):.1f} % |")
    return "\n".join(lines) + "\n"


def _training(model: Model) -> str:
    lines = ["| what | value |", "|---|---|"]
    for name, value in model.card.provenance.items():
        lines.append(f"| {name} | {_plain(value)} |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(evaluation: Evaluation | None, model: Model) -> str:
    if evaluation is None:
        return "This run was not evaluated.\n"
    protocol = evaluation.protocol
    images = (
        f"split `{protocol.get('split')}`, N = {protocol.get('n', 0):,} images, seed {protocol.get('seed')}"
    )
    lines = [
        f"Evaluation {evaluation.number}: {images}.",
        "*Floor*: a model that knows nothing. *Best*: real images or a perfect model. Intervals cover 95 %.",
        "",
    ]
    measured, here = protocol.get("step"), model.card.provenance["step"]
    if measured != here:
        lines += [f"**The numbers are those of step {measured}. This folder holds step {here}.**", ""]
    lines += ["| what | value | 95 % interval | floor | best | metric |", "|---|---:|---|---:|---:|---|"]
    for headline in HEADLINES:
        name = standing_for(headline, [evaluation])
        if name:
            lines.append(_row(evaluation, headline.label, name))
    lines += ["", "How it was measured:", ""]
    for key, setting in protocol.items():
        if setting not in ("", None):
            lines.append(f"- {key}: {setting}")
    return "\n".join(lines) + "\n"


def _row(evaluation: Evaluation, label: str, name: str) -> str:
    value = evaluation.metrics[name]
    about = evaluation.about.get(name, {})
    arrow = {"lower": " ↓", "higher": " ↑"}.get(about.get("direction", ""), "")
    bounds = evaluation.intervals.get(name)
    interval = f"{bounds[0]:.4g} to {bounds[1]:.4g}" if bounds else ""
    ends = []
    for column in (evaluation.floors, evaluation.ceilings):
        ends.append(f"{column[name]:.4g}" if name in column else "")
    meaning = f"`{name}`: {about.get('meaning', '')}".rstrip(": ")
    return f"| {label}{arrow} | {value:.4g} | {interval} | {ends[0]} | {ends[1]} | {meaning} |"


def _limits(model: Model) -> str:
    edit = "moves the code instead" if model.has_control else "carries its noise instead"
    lines = [
        f"- Images have {model.size} pixels and show one face, cut and aligned as the training images are.",
        "- Rare combinations of attributes are drawn from few examples or from none.",
        "- An edit changes more than the named attribute, since attributes go together in the data.",
        f"- A code that is decoded with other attributes changes little; `edit` {edit}.",
    ]
    if not model.can_be_guided:
        fixed = "`guidance`" if model.takes_strength else "`guidance` and `strength`"
        lines.append(f"- The prior cannot be guided: {fixed} must be 1.")
    return "\n".join(lines) + "\n"
