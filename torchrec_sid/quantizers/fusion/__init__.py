"""One Semantic ID from several embeddings and categories."""
