// SPDX-License-Identifier: Apache-2.0

package xtables

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// This file asks the kernel about the tables of the legacy variant. It starts no program.

// LegacyTables are the tables of the legacy variant that exist.
func LegacyTables(f plan.Family) (names []string) {
	file, err := os.Open("/proc/thread-self/net/" + map[plan.Family]string{plan.IPv4: "ip", plan.IPv6: "ip6"}[f] + "_tables_names")
	if err != nil {
		return nil // the module is not loaded
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		names = append(names, lines.Text())
	}
	return names
}

// tableInfo is struct ipt_getinfo.
type tableInfo struct {
	name          [32]byte
	hooks         uint32
	entry         [5]uint32
	underflow     [5]uint32
	entries, size uint32
}

// tableEntries is struct ipt_get_entries. first is where the entries begin.
type tableEntries struct {
	_     [32]byte // name
	size  uint32
	first uint64
}

const (
	getInfo    = 64 // IPT_SO_GET_INFO and IP6T_SO_GET_INFO
	getEntries = 65 // IPT_SO_GET_ENTRIES and IP6T_SO_GET_ENTRIES
)

// legacySocket asks about the tables of one family.
type legacySocket struct {
	fd    int
	level uintptr
}

func openLegacy(f plan.Family) (s legacySocket, err error) {
	domain, level := unix.AF_INET, uintptr(unix.SOL_IP)
	if f == plan.IPv6 {
		domain, level = unix.AF_INET6, unix.SOL_IPV6
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return s, fmt.Errorf("open a socket to the tables of iptables: %w", err)
	}
	return legacySocket{fd, level}, nil
}

func (s legacySocket) close() error { return unix.Close(s.fd) }

// get has the kernel fill a struct of so many bytes, which begins with the table's name.
func (s legacySocket) get(option uintptr, answer unsafe.Pointer, length uintptr) error {
	l := uint32(length)
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), s.level, option, uintptr(answer), uintptr(unsafe.Pointer(&l)), 0); errno != 0 {
		return errno
	}
	return nil
}

func (s legacySocket) info(table string) (i tableInfo, err error) {
	copy(i.name[:], table)
	if err := s.get(getInfo, unsafe.Pointer(&i), unsafe.Sizeof(i)); err != nil {
		return i, fmt.Errorf("ask for the size of table %s: %w", table, err)
	}
	return i, nil
}

// names says whether a table's entries contain a name. The table is in the kernel's form,
// in which the name of a chain ends with a zero byte.
func (s legacySocket) names(table, name string) (bool, error) {
	info, err := s.info(table)
	if err != nil {
		return false, err
	}
	buffer := make([]byte, unsafe.Offsetof(tableEntries{}.first)+uintptr(info.size))
	copy(buffer, table)
	binary.NativeEndian.PutUint32(buffer[unsafe.Offsetof(tableEntries{}.size):], info.size)
	if err := s.get(getEntries, unsafe.Pointer(&buffer[0]), uintptr(len(buffer))); err != nil {
		return false, fmt.Errorf("read table %s: %w", table, err)
	}
	return bytes.Contains(buffer, append([]byte(name), 0)), nil
}

// mayHaveLegacyChain is false if a table of the legacy variant does not exist or lacks the
// chain. It may be true of a table that has the name in a comment.
func mayHaveLegacyChain(f plan.Family, table, chain string) bool {
	if !slices.Contains(LegacyTables(f), table) {
		return false // to ask for it would create it
	}
	s, err := openLegacy(f)
	if err != nil {
		return true
	}
	defer s.close()
	named, err := s.names(table, chain)
	return named || err != nil
}
