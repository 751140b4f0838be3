"""Chats and texts: JSON lines, datasets, token ids, batches."""
