"""``python -m captum_abslrp``: the command line."""

from captum_abslrp.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
