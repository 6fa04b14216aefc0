"""Public, versioned shapes: the custom resources and the manifests that hold them."""
