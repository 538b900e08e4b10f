"""From files to rows of tokens: tokenizers, prompts, the order they are drawn in, batches."""
