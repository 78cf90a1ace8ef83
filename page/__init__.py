"""All kept results, and the user's own runs, on one page: `./run.sh page`."""
