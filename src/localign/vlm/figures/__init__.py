"""The figures of the paper that compare vision-language models, from runs of one's own."""
