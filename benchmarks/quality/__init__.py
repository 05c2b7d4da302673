"""How good are the masks: tasks × methods × sparsities × passes × seeds, as data; tables and pictures made from it."""
