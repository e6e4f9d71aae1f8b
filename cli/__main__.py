"""`python -m llama4_quant.cli` is `llama4-quant`."""

from llama4_quant.cli.main import main

if __name__ == "__main__":
    main()
