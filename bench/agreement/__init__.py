"""How far bf16 training runs move from an fp32 one: with the reference loss and with ours."""

FOLDER = "agreement"  # of the records, inside --results
