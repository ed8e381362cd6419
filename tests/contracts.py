"""What checks the jaxtyping contracts under pytest: beartype, an int passing for a float (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
