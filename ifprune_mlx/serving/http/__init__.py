"""What speaks HTTP with clients: OpenAI's and Anthropic's APIs, the page, metrics."""
