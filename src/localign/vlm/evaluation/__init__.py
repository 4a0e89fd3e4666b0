"""The evaluation of vision-language models on benchmarks: asking, caching answers, scoring, comparing."""
