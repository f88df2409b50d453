"""Predictions spread over the processes of a group; imported only with `group=`."""
