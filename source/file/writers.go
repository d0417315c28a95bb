// SPDX-License-Identifier: Apache-2.0

package file

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// writerTimeout is how long a file is not read while a program has it open for
// writing. A redirected command empties its file when it starts, and may write
// the first byte seconds later.
const writerTimeout = 10 * time.Second

// waitForWriter says whether a program writes to a file, and has not done so for
// longer than writerTimeout.
func (s *Source) waitForWriter(name string, f *os.File) bool {
	if !openForWriting(f) {
		delete(s.writers, name)
		return false
	}
	if s.writers[name].IsZero() {
		s.writers[name] = time.Now()
	}
	return time.Since(s.writers[name]) < writerTimeout
}

// openForWriting says whether a program has the file open for writing. In that
// case, the kernel refuses a read lease. The answer is no on file systems
// without leases, and for files of other users without CAP_LEASE.
func openForWriting(f *os.File) bool {
	conn, err := f.SyscallConn()
	if err != nil {
		return false
	}
	var refusal error
	err = conn.Control(func(fd uintptr) {
		if _, refusal = unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_RDLCK); refusal == nil {
			_, _ = unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_UNLCK)
		}
	})
	return err == nil && errors.Is(refusal, unix.EAGAIN)
}
