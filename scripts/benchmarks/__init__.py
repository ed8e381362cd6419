"""The suites of ``scripts/benchmark.py``, a file each.

A suite has ``suite(args)``, which yields a `benchmarks.paired.Comparison` for every row of its
table; ``arguments(parser)`` may add options of its own. It may hold files or processes open while
it yields, because a row is timed before the next is asked for. A suite that compares nothing yields
dictionaries with a ``name``, which go into the JSON as they are, and has ``table(rows)``, the lines
of its Markdown. To add a suite, add a file here and a line below.
"""

SUITES = {
    "centroids": "every rule against one weighted sum and one norm",
    "nao": "the NAO centroid against the published optimiser",
    "inversion": "DDIM and null-text inversion against diffusers and the published loop",
    "sampling": "the sampler against diffusers' pipeline loop",
    "storage": "banks and shards against safetensors, image folders and webdataset",
    "growth": "how costs grow with classes, images and shards",
    "training": "a step with synthetic images, and with our data, against plain ones",
    "neighbours": "idle threads that sleep against threads that spin, beside busy programs",
    "hot": "where the commands spend their time, and a training step's loading",
    "startup": "imports and commands against the import of torch",
    "backbones": "Stable Diffusion and its like against diffusers' pipelines; not part of all",
}
"""The suites by the name of their file."""
