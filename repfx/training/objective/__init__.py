"""The objective of a training: the loss, with a teacher or an auxiliary head if the recipe has them."""
