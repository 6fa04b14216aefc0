"""What scenarios are written with: waits that follow a watch, a client inside the cluster, apps, and reports of failures."""
