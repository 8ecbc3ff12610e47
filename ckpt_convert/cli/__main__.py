from ckpt_convert.cli import main

main()
