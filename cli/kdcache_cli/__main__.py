"""`python -m kdcache_cli`, for torchrun and for shells without the console script."""

from kdcache_cli.app import main

if __name__ == "__main__":
    main()
