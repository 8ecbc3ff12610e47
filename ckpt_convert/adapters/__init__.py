"""LoRA and DoRA: configs, the modules they change, PEFT's files, and merging."""
