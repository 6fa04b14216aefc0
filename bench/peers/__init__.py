"""The same worker behind other servers, in one run with ours."""
