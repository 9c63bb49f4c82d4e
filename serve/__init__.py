"""From a sealed artifact to answers: vLLM's own OpenAI app under a thin, restarting parent."""
