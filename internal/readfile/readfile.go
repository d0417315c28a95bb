// SPDX-License-Identifier: Apache-2.0

// Package readfile says why a file that an operator named cannot be read.
package readfile

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// Why is an error of the os package without the path, which whoever names the
// file says already, and with what can be done about it. Other errors stay as
// they are. errors.Is finds what it found before.
func Why(err error) error {
	var path *fs.PathError
	if !errors.As(err, &path) {
		return err
	}
	remedy := "look at the file and at what is mounted there"
	switch {
	case errors.Is(err, fs.ErrNotExist):
		remedy = "name a file that is there; in a container, one that is mounted into it"
	case errors.Is(err, syscall.EISDIR):
		remedy = "name the file inside it"
	case errors.Is(err, fs.ErrPermission):
		remedy = "give this process's user the right to read it"
	}
	return fmt.Errorf("%w; %s", path.Err, remedy)
}
