"""Other libraries' command lines, from a config to a merged model; `make test-trainers` runs them, each by itself."""
