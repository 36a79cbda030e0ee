"""Large vision-language models: visual tokens left out between the image tower and the language model, or inside it.

host: the facts an adapter gives. funnel: what a shorter sequence means for embeddings, masks and positions. cache: what
the cache of a pruned prompt remembers. encoded: what is known of the images when the prompt arrives; looks: the layers
of their tower that are scored. prompt: which of its tokens are kept. text: the hooks around the language model. inside,
stages: tokens that leave between its layers. plan: from a budget to tokens of each image. recipe: what a method says.
costs, prefill: multiply-adds. local: the state of a forward. patch: the whole.
"""
