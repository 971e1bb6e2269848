"""One module an operator: shape inference, autograd and the public function."""
