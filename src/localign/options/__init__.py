"""The options of every command: config classes and the names that options take.

A config class stands here and not beside the code that it configures, because the command line answers --help and
refuses a misspelt option without torch, transformers, timm or numpy. This room imports none of them, and no other room.
"""
