"""Large vision-language models: visual tokens left out between the image tower and the language model, or inside it.

host: the facts an adapter gives. funnel: what a shorter sequence means for embeddings, masks and positions. cache: what
the cache of a pruned prompt remembers. encoded: what is known of the images when the prompt arrives. prompt: which of
its tokens are kept. plan: from a budget to tokens of each image. recipe: what a method says. patch: the whole.
"""
