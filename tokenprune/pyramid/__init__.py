"""Very large images in front of a vision-language model: coarse to fine, only the tiles that matter are encoded.

After Luo et al., When Large Vision-Language Model Meets Large Remote Sensing Imagery (ICCV 2025, arXiv 2503.07588).
levels: the image pyramid and its tiles, as integers. regions: tiles read one by one. prompt: a prompt's embeddings with
and without images. walk: from level to level. focus: where the text looks, by the model's own first layers. module,
distill: a small module that learned it. answer: the verb.
"""

from tokenprune.pyramid.answer import Answer, coarse_to_fine
from tokenprune.pyramid.distill import distill
from tokenprune.pyramid.focus import FirstLayers, Seen
from tokenprune.pyramid.module import FocusModule

__all__ = ["Answer", "FirstLayers", "FocusModule", "Seen", "coarse_to_fine", "distill"]
