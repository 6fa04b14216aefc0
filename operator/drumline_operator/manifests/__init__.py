"""One builder per kind of child. PURE: an app in, a manifest out."""
