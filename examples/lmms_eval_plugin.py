"""A patched model in lmms-eval 0.7: its runner for Hugging Face models, which also takes what `tokenprune.patch` takes.

Needs `pip install lmms-eval`, a GPU and the network. Run it as lmms-eval itself, with the model `tokenprune`:

    python examples/lmms_eval_plugin.py --model tokenprune --tasks refcoco_bbox_rec_val --batch_size 1 \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=feather,keep=0.25

The unpatched baseline is lmms-eval's own `--model huggingface` with the same `pretrained`.
"""

import inspect
from typing import Any

from lmms_eval.__main__ import cli_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.chat.huggingface import Huggingface
from lmms_eval.models.registry_v2 import ModelManifest

import tokenprune

RUNNERS = frozenset(inspect.signature(Huggingface.__init__).parameters)


class PatchedHuggingface(Huggingface):
    """Arguments that the runner does not know are those of `tokenprune.patch`: method, keep, tokens, positions ..."""

    def __init__(self, *, method: str, **arguments: Any) -> None:
        super().__init__(**{name: value for name, value in arguments.items() if name in RUNNERS})
        patch = {name: value for name, value in arguments.items() if name not in RUNNERS}
        tokenprune.patch(self.model, method, **patch)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        answers = super().generate_until(requests)
        print(tokenprune.report(self.model))
        return answers


def main() -> None:
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest(model_id="tokenprune", chat_class_path=f"{__name__}.{PatchedHuggingface.__name__}")
    )
    cli_evaluate()


if __name__ == "__main__":
    main()
