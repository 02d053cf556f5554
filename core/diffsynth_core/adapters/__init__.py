"""LoRA on loaded modules, through peft."""
