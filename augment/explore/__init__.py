"""The explorer: a local page to mix a bank's latents by hand.

`augment.explore.session` is what it does, and knows no page; `augment.explore.widgets` are the
pieces of HTML; `augment.explore.page` puts them together with gradio (extra ``explore``), which is
imported there alone, and serves them to this machine.
"""

from augment.explore.session import Choice, Explorer

__all__ = ["Choice", "Explorer"]
