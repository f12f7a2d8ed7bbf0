"""The main job: pretraining a small vision-language model whose attention is chosen by its config."""
