"""What checks the jaxtyping contracts under pytest: beartype, with an int passing for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
